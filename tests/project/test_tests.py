"""Rules that the tests keep themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
#: What keeps a checker or a test from running, without the reason that has to follow it.
SUPPRESSION = re.compile(r"# (?:type: ignore\[[\w, -]+\]|noqa: [A-Z]\w*(?:, ?[A-Z]\w*)*|pragma: no cover)\s*$")
SKIP = re.compile(
    r"pytest\.(?:skip|mark\.skip|mark\.xfail|xfail)\(\s*\)|mark\.(?:skip|xfail)$|skipif\((?!.*reason=)[^\n]*\)$"
)
#: What a test calls an engine or a callback.
NAMES = "kfc|callback|engine|twin|shown"
OWNERS = re.compile(rf"^(?:.*\.)?(?:{NAMES})$")


def private(source: str) -> list[str]:
    """The private attributes of an engine or a callback that a source names."""
    # To parse every file takes long.
    suspected = re.search(rf"(?:{NAMES})\s*\._(?!_)", source) is not None
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in (ast.walk(ast.parse(source)) if suspected else ())
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and OWNERS.match(ast.unparse(node.value))
    ]


def test_no_test_reads_a_private_attribute_of_the_engine_or_the_callback() -> None:
    found = {path.relative_to(TESTS).as_posix(): private(path.read_text("utf-8")) for path in TESTS.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_private_attribute_is_found_where_it_stands() -> None:
    assert private("kfc._a\ntwo.kfc._c.d") == ["line 1: kfc._a", "line 2: two.kfc._c"]
    assert private("kfc.e; kfc.__dict__; self._f; model._kfc") == []


def unexplained(source: str) -> list[str]:
    """The lines that keep a checker or a test from running, without a reason in the line or the comment before it."""
    lines = source.splitlines()
    return [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(lines, start=1)
        if (SUPPRESSION.search(line) or SKIP.search(line)) and not lines[number - 2].lstrip().startswith("# ")
    ]


def test_every_suppression_and_skip_has_its_reason() -> None:
    folders = ("lightning_kfc", "tests", "benchmarks", "docs", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): unexplained(path.read_text("utf-8")) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_suppression_without_a_reason_is_found_where_it_stands() -> None:
    bare = "# type: ignore" + "[misc]"
    assert unexplained(f"x = 1  {bare}\ny = 2  {bare}  # it is untyped") == [f"line 1: x = 1  {bare}"]
    assert unexplained(f"# It is untyped.\nx = 1  {bare}") == []
    assert len(unexplained("z = 3\n@pytest.mark.skip" + "()\n@pytest.mark.skip")) == 2
