"""Rules that the tests keep themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
#: What a test calls an engine or a callback.
OWNERS = re.compile(r"^(?:.*\.)?(?:kfc|callback|engine|twin|shown)$")


def private(source: str) -> list[str]:
    """The private attributes of an engine or a callback that a source names."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and OWNERS.match(ast.unparse(node.value))
    ]


def test_no_test_reads_a_private_attribute_of_the_engine_or_the_callback() -> None:
    found = {path.relative_to(TESTS).as_posix(): private(path.read_text("utf-8")) for path in TESTS.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_private_attribute_is_found_where_it_stands() -> None:
    assert private("kfc._a\ntwo.kfc._c.d") == ["line 1: kfc._a", "line 2: two.kfc._c"]
    assert private("kfc.e; kfc.__dict__; self._f; model._kfc") == []
