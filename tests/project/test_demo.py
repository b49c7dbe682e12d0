"""The examples: ``make demo`` in small, and the runner that CI checks all of them with."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.contest.networks import conv_net
from benchmarks.contest.tuning import Tuning

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


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_example("mnist_demo")


@pytest.fixture(scope="module")
def run_all() -> ModuleType:
    return load_example("run_all")


def test_quick_demo_trains_all_on_each_seed_and_counts_no_evaluation_as_time(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    step, loss_of = demo.ConvNet.training_step, demo.Watch.loss_of

    def step_of_one_second(self: Any, *args: Any) -> Any:
        clock[0] += 1.0
        return step(self, *args)

    def evaluation_of_a_hundred(self: Any, *args: Any) -> Any:
        clock[0] += 100.0
        return loss_of(self, *args)

    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(demo.ConvNet, "training_step", step_of_one_second)
    monkeypatch.setattr(demo.Watch, "loss_of", evaluation_of_a_hundred)
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    try:
        runs = demo.main(["--quick", "--log-dir", str(tmp_path)])
    finally:
        log.setLevel(level)

    assert list(runs) == list(demo.OPTIMIZERS)
    for name, watches in runs.items():
        assert [watch.seconds for watch in watches] == [8.0, 8.0, 8.0]
        assert len({watch.accuracy for watch in watches}) > 1, "the seeds are one"
        assert len(list((tmp_path / name).rglob("events.out.tfevents.*"))) == 3
    kfc, sgd = runs["SGD + KFC"][0], runs["SGD"][0]
    assert kfc.reached[0.3] == (kfc.reached[0.3][0], kfc.reached[0.3][0])
    assert sgd.reached == {}, "the callback changed nothing"
    assert "KFC: training of ConvNet" in (tmp_path / "kfc_report" / "report.html").read_text("utf-8")
    printed = capsys.readouterr().out
    assert "median of 3 seeds" in printed
    assert "docs/which_optimizer.md" in printed


def watch(demo: ModuleType, accuracy: float, *reached: tuple[int, float]) -> Any:
    found = demo.Watch([torch.zeros(1)] * 4)
    found.reached, found.accuracy = dict(zip(demo.TARGETS, reached, strict=False)), accuracy
    return found


def test_table_shows_the_first_seed_beside_the_median_and_takes_the_fastest(demo: ModuleType) -> None:
    slow = [
        watch(demo, 0.9, (60, 6.0), (90, 9.0)),
        watch(demo, 0.8, (40, 4.0), (80, 8.0), (99, 9.5)),
        watch(demo, 0.7, (50, 5.0), (70, 7.0), (88, 8.5)),
    ]
    fast = [watch(demo, 0.95, (10, 3.0), (20, 4.0), (30, it / 10)) for it in (50, 40, 45)]
    rows = [" ".join(line.split()) for line in demo.table({"SGD": slow, "SGD + KFC": fast}).splitlines()]
    assert rows[0] == "seed 1 median of 3 seeds"
    assert rows[1] == "loss 0.3 SGD 60 it, 6.0 s 50 it, 5.0 s"
    assert rows[5] == "loss 0.03 SGD not reached 99 it, 9.5 s"
    assert rows[6] == "loss 0.03 SGD + KFC 30 it, 5.0 s 30 it, 4.5 s"
    assert rows[7:9] == ["accuracy SGD 0.900 0.800", "accuracy SGD + KFC 0.950 0.950"]
    assert rows[-1].startswith("Take SGD + KFC here: SGD needs 2.1 x the time.")


def test_where_no_run_gets_there_none_is_taken(demo: ModuleType) -> None:
    nowhere = [watch(demo, 0.1)] * 3
    assert "None got there in two of three runs." in demo.table({"a": nowhere, "b": nowhere})


def test_demo_trains_the_benchmarks_conv_net_at_the_rates_that_were_searched(demo: ModuleType) -> None:
    shapes = {name.removeprefix("net."): p.shape for name, p in demo.ConvNet("SGD").named_parameters()}
    assert shapes == {name: p.shape for name, p in conv_net().named_parameters()}
    results = json.loads((ROOT / "benchmarks" / "results" / "contest_conv_b512.json").read_text())
    rates = {name: settings["lr"] for name, (_, settings) in demo.OPTIMIZERS.items()}
    assert rates == {
        name: results["lrs"][key] for name, key in (("SGD", "sgd"), ("AdamW", "adamw"), ("SGD + KFC", "kfc"))
    }
    tuning = Tuning.load(ROOT / "benchmarks" / "results" / "tuning_conv_b512.json")
    assert tuning.target == demo.TARGETS[-1]
    # AdamW has Adam's rate.
    assert (rates["SGD"], rates["AdamW"]) == (tuning.choice("sgd"), tuning.choice("adam"))
    assert not {trial.seed for trials in tuning.trials["sgd"].values() for trial in trials} & set(demo.SEEDS)


def test_runner_of_examples_fails_where_one_fails_and_shows_its_output(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_all, "ARGUMENTS", {})
    (tmp_path / "good.py").write_text("import sys; assert sys.argv[1:] == []")
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
    for name in ("plain.py", "cli.py", "cli.yaml", "named.py", "run_all.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(run_all, "ARGUMENTS", {"named.py": [("{examples}/x", "1"), ("2",)]})
    found = [[Path(command[1]).name, *command[2:]] for command in run_all.commands(tmp_path)]
    assert found == [
        ["cli.py", "fit", "--config", str(tmp_path / "cli.yaml")],
        ["named.py", f"{tmp_path}/x", "1"],
        ["named.py", "2"],
        ["plain.py"],
    ]
    monkeypatch.setattr(run_all, "ARGUMENTS", {"gone.py": [()]})
    with pytest.raises(ValueError, match=r"gone\.py"):
        run_all.commands(tmp_path)
