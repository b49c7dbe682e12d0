"""What makes the pages: the scripts behind their numbers, and what is done to their HTML."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import examples_outcome
from benchmarks.cost import quickstart_time

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_quickstart_is_taken_apart_into_what_its_reader_types() -> None:
    install, program, run = quickstart_time.steps(quickstart_time.PAGE.read_text("utf-8"))
    assert "python -m venv" in install
    assert "pip install" in install
    assert run == "python first_run.py\n"
    compile(program, "first_run.py", "exec")
    assert "KFCCallback()" in program
    assert "callback.kfc.coverage()" in program
    assert "pytorch_lightning" not in program, "the sections after the steps are no part of the file"


def test_a_command_of_the_quickstart_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="status 3:\nthe reason"):
        quickstart_time.timed("echo the reason; exit 3", tmp_path)
    seconds, printed = quickstart_time.timed("pwd", tmp_path)
    assert 0 < seconds < 30
    assert printed.strip() == str(tmp_path)


def outcome(*finals: float) -> dict[str, Any]:
    def run(final: float, seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "steps": [1, 5, 9], "metrics": {"Frechet distance": [3.0, 2.0, final]}}

    names = ("with KFCCallback()", "SGD alone", "Adam alone")
    return {"wall": 10.0, "runs": {n: run(f, s) for n, f, s in zip(names, finals, (3.0, 2.0, 2.0), strict=True)}}


def test_outcomes_of_examples_are_medians_over_seeds_and_a_run_that_diverged_is_the_worst() -> None:
    found = {"gan": {"0": outcome(0.5, 0.7, 0.9), "1": outcome(0.3, 0.1, 0.2), "2": outcome(0.4, float("nan"), 0.25)}}
    text = examples_outcome.markdown(found)
    assert text.startswith("Medians of 3 seeds")
    rows = [row for row in text.splitlines() if row.startswith("| `gan` | Frechet")]
    assert [row.split(" | ")[2] for row in rows] == ["1", "5", "9"]
    assert rows[-1].replace("\u2060\u2013\u2060", " to ").replace("\u00a0", " ") == (
        "| `gan` | Frechet distance | 9 | 0.4 (0.3 to 0.5) | 0.7 (0.1 to diverged) | **0.25** (0.2 to 0.9) | 1.5 |"
    )
    assert text.splitlines()[-1] == "| `gan` | 10 |"


def test_every_example_is_run_whole_once_or_with_each_seed() -> None:
    examples = {p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "run_all" and not p.stem.startswith("_")}
    assert {name for name, _ in examples_outcome.pieces()} == examples
    assert not set(examples_outcome.COMPARISONS) & set(examples_outcome.OTHERS)


def test_an_example_is_recorded_with_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = """
SEED = 0
class History:
    def __init__(self): self.rows = [(4, {"loss": 0.5 + SEED}), (8, {"loss": 0.25})]
def compare(runs, fit):
    for name in runs: fit(name)
    return {name: History() for name in runs}
"""
    (tmp_path / "_shared.py").write_text(shared)
    (tmp_path / "one.py").write_text("from _shared import compare\ncompare({'a': 1, 'b': 2}, lambda name: name)")
    monkeypatch.setattr(examples_outcome, "EXAMPLES", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.delitem(sys.modules, "_shared", raising=False)
    try:
        examples_outcome.record("one", 7, tmp_path / "out.json")
    finally:
        sys.modules.pop("_shared", None)
    runs = json.loads((tmp_path / "out.json").read_text())
    assert list(runs) == ["a", "b"]
    assert runs["a"]["steps"] == [4, 8]
    assert runs["a"]["metrics"] == {"loss": [7.5, 0.25]}
    assert runs["a"]["seconds"] >= 0


def test_names_in_code_may_break_at_their_joints_and_numbers_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from breaks import with_breaks

    def code(text: str) -> str:
        return f'<p>a_b</p><code><span class="pre">{text}</span></code>'

    assert with_breaks(code("kfc/time_reviews")) == code("kfc/<wbr>time_<wbr>reviews")
    assert with_breaks(code("BatchNorm2d")) == code("Batch<wbr>Norm2d")
    assert with_breaks(code("lr=0.5")) == code("lr=0.5")


def test_bars_in_formulas_neither_grow_nor_keep_a_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from mathml import to_mathml

    norm = to_mathml(r"\lVert A\rVert_F^2", "inline")
    assert norm.count('<mo stretchy="false" lspace="0" rspace="0">&#x02016;</mo>') == 2
    assert '<mi>log</mi><mspace width="0.17em"/><mi>p</mi>' in to_mathml(r"\log p", "inline")


def test_foreign_names_are_those_of_objects_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from foreign_names import ALIASES, PAGES

    for name, page in PAGES.items():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
        address, _, anchor = page.partition("#")
        assert address.startswith("https://"), page
        assert anchor.rpartition(".")[2] == attribute, page
    assert set(ALIASES.values()) <= set(PAGES)
