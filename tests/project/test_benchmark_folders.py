"""The dependencies of the folders of `benchmarks/`."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.name != "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Modules of `benchmarks` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def test_no_benchmark_imports_what_imports_it() -> None:
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(MODULES), "the benchmarks share modules"
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_table_of_benchmarks_lists_every_script_that_measures() -> None:
    scripts = {
        name.removesuffix(".__main__")
        for name, path in MODULES.items()
        if "__main__" in path.read_text(encoding="utf-8")
    }
    named = set(re.findall(r"python -m (benchmarks[.\w]+)", (ROOT / "benchmarks" / "README.md").read_text("utf-8")))
    assert named == scripts - {"benchmarks.contest.plots", "benchmarks.contest.goals"}
