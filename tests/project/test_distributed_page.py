"""Every cell of the page's tables names a test that exists, or a refusal with the test of it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").partition("## What travels")[0]


def listed() -> dict[int, str]:
    return {int(number): test for number, test in re.findall(r"^(\d+)\. `(test_.+)`$", PAGE, flags=re.MULTILINE)}


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    heads = ("| strategy |", "| with DDP |", "| what goes wrong |")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith(heads)]


def test_every_cell_names_a_test() -> None:
    strategies = [row for row in rows() if len(row) == 9]
    others = [row for row in rows() if len(row) == 3]
    assert len(strategies) == 7
    assert len(strategies) + len(others) == len(rows())
    cells = [cell for row in strategies for cell in row[1:]] + [row[-1] for row in others]
    numbers = [re.search(r"(\d+)$", cell) for cell in cells]
    assert [cell for cell, number in zip(cells, numbers, strict=True) if number is None] == []
    assert {int(number.group()) for number in numbers if number is not None} == set(listed())


def test_every_test_that_the_page_names_exists_with_its_case() -> None:
    sources: dict[str, list[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^def (test_\w+)\(", text, flags=re.MULTILINE):
            sources.setdefault(name, []).append(text)
    for entry in listed().values():
        name, _, case = entry.removesuffix("]").partition("[")
        found = sources.get(name, [])
        assert len(found) == 1, entry
        for part in case.split(" to "):
            assert f'"{part}"' in found[0] or not part, entry
