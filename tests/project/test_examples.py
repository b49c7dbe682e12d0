"""The examples: short, on the page that lists them, with the outcome that they were seen to have."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import examples_outcome
from tests.project.test_demo import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.name != "run_all.py")
SHORT = [path for path in EXAMPLES if path.name != "mnist_demo.py"]
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "benchmarks" / "results" / "examples.json").read_text("utf-8"))["found"]


def described(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def test_page_lists_every_example_with_its_command_and_no_other() -> None:
    listed = re.findall(r"python examples/(\w+\.py)", PAGE)
    assert sorted(set(listed)) == [path.name for path in EXAMPLES]


def test_the_outcome_of_every_example_was_measured() -> None:
    assert set(examples_outcome.EXAMPLES) == set(FOUND) == {path.stem for path in EXAMPLES}
    assert (
        examples_outcome.markdown(FOUND) == (ROOT / "benchmarks" / "results" / "examples.md").read_text("utf-8").strip()
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_documents_how_it_is_run(path: Path) -> None:
    assert f"python examples/{path.name}" in described(path) or "make demo" in described(path)


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_example_is_below_60_lines_needs_no_other_file_and_states_the_measured_outcome(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 60
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not modules & {other.stem for other in EXAMPLES}
    assert f"Outcome: {FOUND[path.stem]['outcome']}" in " ".join(described(path).split())


def test_an_outcome_is_the_last_line_and_a_failure_shows_what_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_text(
        "import sys; sum(range(3 * 10**7)); print('first'); print(f'  last {sys.argv[1]}  ')"
    )
    (tmp_path / "bad.py").write_text("print('why'); raise SystemExit(3)")
    monkeypatch.setattr(examples_outcome, "FOLDER", tmp_path)
    monkeypatch.setattr(examples_outcome, "EXAMPLES", {"good": ("7",), "bad": ()})
    found = examples_outcome.measure("good")
    assert found["outcome"] == "last 7"
    assert 0.1 <= found["seconds"] < 30
    assert examples_outcome.markdown({"good": found}).splitlines()[-1].startswith("| `good.py` | last 7 | ")
    with pytest.raises(RuntimeError, match="status 3:\nwhy"):
        examples_outcome.measure("bad")


def test_outcomes_are_measured_in_pieces_and_again_where_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(examples_outcome, "EXAMPLES", {"one": (), "two": ()})
    monkeypatch.setattr(
        examples_outcome, "measure", lambda name: measured.append(name) or {"outcome": name, "seconds": 1.0}
    )
    folder = ["--results", str(tmp_path)]
    assert examples_outcome.main([*folder, "--pieces", "1"]) == 3
    assert examples_outcome.main(folder) == 0
    assert examples_outcome.main(folder) == 0
    assert measured == ["one", "two"]
    assert examples_outcome.main([*folder, "--again", "one"]) == 0
    assert measured == ["one", "two", "one"]
    assert list(json.loads((tmp_path / "examples.json").read_text())["found"]) == ["one", "two"]
