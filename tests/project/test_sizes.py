"""Bounds on the size of files, classes and constructors, and on what a part may hold of its owner."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path

import lightning_kfc

PACKAGE = Path(lightning_kfc.__file__).parent
#: The constructors that list the options.
MANY_ARGUMENTS = {"KFCOptions", "Settings"}


@dataclass
class Found:
    """The lengths of the package's classes, the arguments of their constructors, and what is given a function."""

    lengths: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, int] = field(default_factory=dict)
    given_functions: list[str] = field(default_factory=list)


@functools.cache
def found() -> Found:
    """Read from files that are parsed once for all tests, which takes long."""
    facts = Found()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                facts.lengths[node.name] = (node.end_lineno or 0) - node.lineno + 1
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        facts.arguments[node.name] = len(method.args.args) - 1 + len(method.args.kwonlyargs)
            elif isinstance(node, ast.Lambda) and "self" in {
                inner.id for inner in ast.walk(node.body) if isinstance(inner, ast.Name)
            }:
                facts.given_functions.append(f"{path.name}:{node.lineno}")
    return facts


def test_no_constructor_has_more_than_twelve_arguments() -> None:
    counts = found().arguments
    assert {name: count for name, count in counts.items() if count > 12 and name not in MANY_ARGUMENTS} == {}


def test_nothing_is_given_a_function_of_its_owner() -> None:
    assert found().given_functions == []


def test_no_class_is_longer_than_300_lines() -> None:
    assert {name: count for name, count in found().lengths.items() if count > 300} == {}


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text("utf-8").splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lengths.items() if count > 350} == {}
