"""Bounds on the size of files, classes and constructors, and on what a part may hold of its owner."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_kfc

PACKAGE = Path(lightning_kfc.__file__).parent
#: The constructors that list the options.
MANY_ARGUMENTS = {"KFCOptions", "Settings"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def classes() -> list[tuple[Path, ast.ClassDef]]:
    return [(p, node) for p in PACKAGE.rglob("*.py") for node in ast.walk(tree(p)) if isinstance(node, ast.ClassDef)]


def test_no_constructor_has_more_than_twelve_arguments() -> None:
    found = {}
    for _, node in classes():
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                found[node.name] = len(method.args.args) - 1 + len(method.args.kwonlyargs)
    assert {name: count for name, count in found.items() if count > 12 and name not in MANY_ARGUMENTS} == {}


def test_nothing_is_given_a_function_of_its_owner() -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Lambda) and any(isinstance(n, ast.Name) and n.id == "self" for n in ast.walk(node.body))
    ]
    assert found == []


def test_no_class_is_longer_than_300_lines() -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for _, node in classes()}
    assert {name: count for name, count in lengths.items() if count > 300} == {}


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text("utf-8").splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lengths.items() if count > 350} == {}
