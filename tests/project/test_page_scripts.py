"""The scripts behind the pages: their numbers and their HTML."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

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


def test_a_command_of_the_quickstart_that_fails_reports_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="status 3:\nthe reason"):
        quickstart_time.timed("echo the reason; exit 3", tmp_path)
    seconds, printed = quickstart_time.timed("pwd", tmp_path)
    assert 0 < seconds < 30
    assert printed.strip() == str(tmp_path)


def test_names_in_code_may_break_at_their_joints_and_numbers_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from breaks import with_breaks

    def code(text: str) -> str:
        return f'<p>a_b</p><code><span class="pre">{text}</span></code>'

    assert with_breaks(code("kfc/time_reviews")) == code("kfc/<wbr>time_<wbr>reviews")
    assert with_breaks(code("BatchNorm2d")) == code("Batch<wbr>Norm2d")
    assert with_breaks(code("Precision(inverses=")) == code("Precision(<wbr>inverses=")
    assert with_breaks(code("SGD(lr=0.5")) == code("SGD(lr=0.5")


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
