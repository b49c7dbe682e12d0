"""The examples: ``make demo`` in small, and the runner that CI checks all of them with."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.contest.networks import conv_net
from tests.reporting.test_reporting import PICTURES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def load_example(name: str) -> ModuleType:
    """An example as a module, as its own file runs it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def pictures(folder: Path) -> list[str]:
    """The tags of the images in a TensorBoard run directory."""
    (events,) = folder.rglob("events.out.tfevents.*")
    return sorted(EventAccumulator(str(events)).Reload().Tags()["images"])


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_example("mnist_demo")


@pytest.fixture(scope="module")
def run_all() -> ModuleType:
    return load_example("run_all")


def test_quick_demo_trains_twice_logs_both_and_counts_no_evaluation_as_time(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    original_step, original_loss = demo.ConvNet.training_step, demo.LossOverTime.loss_of

    def step_of_one_second(self: Any, *args: Any) -> Any:
        clock[0] += 1.0
        return original_step(self, *args)

    def evaluation_of_a_hundred(self: Any, *args: Any) -> Any:
        clock[0] += 100.0
        return original_loss(self, *args)

    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(demo.ConvNet, "training_step", step_of_one_second)
    monkeypatch.setattr(demo.LossOverTime, "loss_of", evaluation_of_a_hundred)

    plain, kfc = demo.main(["--quick", "--log-dir", str(tmp_path)])

    # A training step runs once, also where the step is reviewed.
    for name, outcome in (("sgd", plain), ("kfc", kfc)):
        assert list((tmp_path / name).rglob("events.out.tfevents.*")), f"no event file of {name}"
        assert outcome.history.iterations == list(range(1, 9))
        assert outcome.history.seconds == [float(i) for i in range(1, 9)]
        assert 0 < outcome.test_accuracy <= 1
    assert plain.history.losses[0] != kfc.history.losses[0], "the callback changed nothing"
    assert pictures(tmp_path / "sgd") == []
    assert pictures(tmp_path / "kfc") == sorted(f"kfc/{name}" for name in PICTURES)
    assert "KFC: training of ConvNet" in (tmp_path / "kfc_report" / "report.html").read_text("utf-8")
    printed = capsys.readouterr().out
    for row in (
        "to training loss 0.3",
        "to training loss 0.03",
        "... of averaged weights",
        "test accuracy of these",
        "SGD / KFC",
    ):
        assert row in printed


def test_table_shows_what_each_run_needed_and_the_ratios(demo: ModuleType) -> None:
    def outcome(iterations: list[int], seconds: list[float], losses: list[float]) -> Any:
        history = demo.LossOverTime(None, None, iterations, seconds, losses)
        return demo.Outcome(history, 0.01, 0.9)

    plain = outcome([10, 60, 90], [1.0, 6.0, 9.0], [0.5, 0.25, 0.09])
    kfc = outcome([10, 12, 20], [4.0, 5.0, 6.0], [0.5, 0.2, 0.01])
    rows = demo.table(plain, kfc).splitlines()
    row = {r.split()[3]: " ".join(r.split()[4:]) for r in rows if "to training loss" in r}
    assert row["0.3"] == "60 it, 6.0 s 12 it, 5.0 s 5.0 x it, 1.20 x s"
    assert row["0.1"] == "90 it, 9.0 s 20 it, 6.0 s 4.5 x it, 1.50 x s"
    assert row["0.03"] == "not reached 20 it, 6.0 s -"


def test_the_demo_prints_the_contests_medians_beside_its_one_seed(demo: ModuleType) -> None:
    contest = json.loads((ROOT / "benchmarks" / "results" / "contest_conv_b512.json").read_text())
    printed = demo.contest_medians()
    rows = dict(re.findall(r"^  (\S.*?)  +(\d+) / ", printed, re.MULTILINE))
    assert {"SGD, momentum 0.9", "AdamW", "Muon", "KFC, defaults"} <= set(rows)
    assert all(int(needed) > int(rows["KFC, defaults"]) for name, needed in rows.items() if not name.startswith("KFC"))
    assert f"seconds to {min(contest['targets']):g}:" in printed


def test_demo_trains_the_benchmarks_conv_net_at_the_benchmarks_learning_rates(demo: ModuleType) -> None:
    shapes = {name.removeprefix("net."): p.shape for name, p in demo.ConvNet(0.1, 0.9).named_parameters()}
    assert shapes == {name: p.shape for name, p in conv_net().named_parameters()}
    results = json.loads((ROOT / "benchmarks" / "results" / "contest_conv_b512.json").read_text())
    assert demo.SGD_ALONE[0] == results["lrs"]["sgd"]
    assert demo.SGD_WITH_KFC[0] == results["lrs"]["kfc"]


def test_runner_of_examples_fails_where_one_fails_and_shows_its_output(
    run_all: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text("import sys; assert sys.argv[1:] == ['--quick']")
    (tmp_path / "bad.py").write_text("print('why'); raise SystemExit(3)")
    bad, good = run_all.commands(tmp_path)
    assert run_all.run(good)
    assert capsys.readouterr().out.startswith("ok")
    assert not run_all.run(bad)
    printed = capsys.readouterr().out
    assert "why" in printed
    assert "exit status 3" in printed


def test_runner_of_examples_finds_new_ones_and_fits_those_with_a_configuration(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plain.py", "cli.py", "cli.yaml", "named.py", "_part.py", "run_all.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(run_all, "ARGUMENTS", {"named.py": [("{examples}/x", "1"), ("2",)]})
    found = [[Path(command[1]).name, *command[2:]] for command in run_all.commands(tmp_path)]
    assert found == [
        ["cli.py", "fit", "--config", str(tmp_path / "cli.yaml"), "--trainer.max_epochs=1"],
        ["named.py", f"{tmp_path}/x", "1"],
        ["named.py", "2"],
        ["plain.py", "--quick"],
    ]
    monkeypatch.setattr(run_all, "ARGUMENTS", {"gone.py": [()]})
    with pytest.raises(ValueError, match=r"gone\.py"):
        run_all.commands(tmp_path)
