"""The compatibility page names tests that exist, and strategies that cannot work are refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import FSDPStrategy

from lightning_kfc import KFCCallback

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_of_the_page_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").partition("## Precision")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| training |")]
    rows = [row for row in rows if not row.startswith("| input |")]
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    named = {row: re.findall(r"`(test_\w+)`", row) for row in rows}
    assert len(rows) > 50
    assert [row for row, tests in named.items() if not tests] == []
    assert {test for tests in named.values() for test in tests} - defined == set()


def test_every_guarantee_names_tests_and_has_the_command_that_runs_them() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = [
        re.findall(r"`(test_\w+)`", row) for row in page.splitlines() if row.startswith("| ") and "| test |" not in row
    ]
    commands = re.findall(r"^\S+ -m pytest (tests/\S+) -k \"(.*)\"$", page, flags=re.MULTILINE)
    assert len(named) > 8
    assert all(named)
    assert [chosen.split(" or ") for _, chosen in commands] == named
    for file, chosen in commands:
        defined = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(chosen.split(" or ")) <= set(defined), file


@pytest.mark.parametrize(
    ("strategy", "way_out"),
    [
        (FSDPStrategy(), "FSDPStrategy: use ModelParallelStrategy"),
        # DeepSpeed's own class cannot be made without the package; the refusal goes by the class's name.
        (type("DeepSpeedStrategy", (), {})(), "DeepSpeedStrategy: use DDPStrategy"),
    ],
)
def test_strategies_that_leave_no_room_are_refused_with_the_alternative(strategy: object, way_out: str) -> None:
    # FSDP1 requires an accelerator before any callback is called, so that no Trainer here gets that far.
    with pytest.raises(ValueError, match=way_out):
        KFCCallback().setup(SimpleNamespace(strategy=strategy), pl.LightningModule(), "fit")
