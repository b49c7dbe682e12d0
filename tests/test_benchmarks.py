"""The benchmark harness, on curves and tasks made up so that the right answer is known."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import convergence, harness, step_cost
from benchmarks.curves import NEVER, Curve, Reach, at_edge, best_of_grid, median_ratio
from benchmarks.networks import AUTOENCODER_WIDTHS, deep_autoencoder, resnet20
from benchmarks.optimizers import CONTESTANTS, Contestant
from benchmarks.report import Results, markdown
from benchmarks.tasks import TASKS, Task
from lightning_kfc.schedule import RefreshSchedule


def curve_of(loss: Callable[[int], float], iterations: list[int], seconds_each: float = 0.5) -> Curve:
    return Curve(iterations, [seconds_each * i for i in iterations], [loss(i) for i in iterations])


class Linear(nn.Linear):
    """A model small enough for a thousand steps."""

    def __init__(self) -> None:
        super().__init__(3, 2)


def tiny_task(budget: int = 12, targets: tuple[float, ...] = (1e-2, 1e-4)) -> Task:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(20, 3, generator=generator)
    outputs = inputs @ torch.randn(3, 2, generator=generator)
    return Task(
        name="tiny",
        title="a line",
        make_model=Linear,
        loss=nn.functional.mse_loss,
        data=lambda: (inputs, outputs),
        targets=targets,
        budget=budget,
        batch_size=8,
    )


# Curves.


@pytest.mark.parametrize("spacing", [1, 3, 7])
def test_time_to_target_of_a_geometric_curve_does_not_depend_on_how_often_it_is_evaluated(spacing: int) -> None:
    curve = curve_of(lambda i: math.exp(-i / 10), list(range(0, 70, spacing)))
    reached = curve.reach(0.05)
    assert reached.iterations == pytest.approx(10 * math.log(20))
    assert reached.seconds == pytest.approx(5 * math.log(20))


def test_first_crossing_counts_even_if_the_loss_rises_again() -> None:
    curve = Curve([0, 10, 20, 30], [0.0, 1.0, 2.0, 3.0], [1.0, 0.1, 0.5, 0.01])
    assert curve.reach(0.1) == Reach(10, 1.0)


def test_a_target_that_is_never_met_or_met_at_the_start_is_told_apart() -> None:
    curve = Curve([0, 10], [0.0, 1.0], [1.0, 0.5])
    assert curve.reach(0.4) is NEVER
    assert curve.reach(2.0) == Reach(0, 0.0)


def test_a_loss_of_nan_reaches_nothing_and_counts_as_divergence() -> None:
    curve = Curve([0, 1], [0.0, 1.0], [1.0, math.nan])
    assert curve.reach(0.5) is NEVER
    assert curve.diverged()
    assert Curve([0, 1], [0.0, 1.0], [1.0, 10.1]).diverged()
    assert not Curve([0, 1], [0.0, 1.0], [1.0, 9.9]).diverged()


# Grids and ratios.


def test_grid_choice_is_the_fewest_iterations_to_the_target_by_the_median_seed() -> None:
    def geometric(scale: float) -> Curve:
        return curve_of(lambda i: math.exp(-i / scale), list(range(100)))

    curves = {
        0.1: [geometric(5), geometric(5), geometric(5)],
        0.2: [geometric(1), geometric(8), geometric(8)],  # lucky once
        0.5: [geometric(4), geometric(4), curve_of(lambda i: math.nan if i else 1.0, [0, 1])],  # diverges once
    }
    assert best_of_grid(curves, 0.01) == 0.5


def test_grid_choice_where_nothing_reaches_the_target_is_the_lowest_end_and_never_a_diverged_run() -> None:
    curves = {
        0.1: [Curve([0, 9], [0.0, 1.0], [1.0, 0.8])],
        0.2: [Curve([0, 9], [0.0, 1.0], [1.0, 0.6])],
        0.5: [Curve([0, 9], [0.0, 1.0], [1.0, math.nan])],
    }
    assert best_of_grid(curves, 0.01) == 0.2


def test_the_edge_of_a_grid_is_told_from_its_inside() -> None:
    assert at_edge(0.5, (0.1, 0.5, 0.2))
    assert not at_edge(0.2, (0.1, 0.5, 0.2))
    assert not at_edge(0.5, (0.5,))


def test_ratios_are_paired_by_seed_before_the_median_is_taken() -> None:
    # The ratio of medians would be 20 / 2 = 10.
    assert median_ratio([1, 2, 10], [20, 10, 30]) == 5


def test_ratio_to_a_run_that_never_arrives_is_infinite_and_of_two_such_runs_undefined() -> None:
    assert median_ratio([1.0], [math.inf]) == math.inf
    assert median_ratio([math.inf], [1.0]) == 0
    assert math.isnan(median_ratio([math.inf], [math.inf]))
    with pytest.raises(ValueError, match="got 1 and 2"):
        median_ratio([1.0], [1.0, 2.0])


# Runs.


def test_all_contestants_of_a_seed_start_from_the_same_weights_and_see_the_same_batches() -> None:
    task = tiny_task()
    runs = [harness.Run(task, CONTESTANTS[name], 0.1, seed=3) for name in ("sgd", "adam", "kfc")]
    assert len({run.curve.losses[0] for run in runs}) == 1
    assert harness.Run(task, CONTESTANTS["sgd"], 0.1, seed=4).curve.losses != runs[0].curve.losses
    one, two = task.batches(3), task.batches(3)
    assert all(torch.equal(next(one)[0], next(two)[0]) for _ in range(10))


def test_an_epoch_of_batches_holds_no_example_twice() -> None:
    batches = tiny_task().batches(0)
    epoch = torch.cat([next(batches)[0] for _ in range(2)])  # 20 examples hold two batches of 8
    assert epoch.shape == (16, 3)
    assert len(epoch.unique(dim=0)) == 16


def _noting(name: str, made: list[str]) -> Contestant:
    class Noting:
        def step(self, compute_loss: Callable[[], Tensor]) -> None:
            made.append(name)

    return Contestant(name, name, lambda model, lr, seed: Noting(), (1.0,))


def test_runs_advance_by_turns_of_one_block_and_stop_at_the_budget() -> None:
    made: list[str] = []
    task = tiny_task(budget=12)
    runs = [harness.Run(task, _noting(name, made), 1.0, 0) for name in "ab"]
    harness.interleave(runs, block=5)
    assert "".join(made) == "aaaaabbbbb" * 2 + "aabb"


def test_a_run_stops_early_where_the_caller_says_so() -> None:
    made: list[str] = []
    runs = [harness.Run(tiny_task(budget=12), _noting("a", made), 1.0, 0)]
    harness.interleave(runs, until=lambda run: run.curve.iterations[-1] >= 4, block=2)
    assert len(made) == 4


def test_seconds_are_those_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class OneSecond:
        def step(self, compute_loss: Callable[[], Tensor]) -> None:
            clock[0] += 1.0

    def slow_loss(self: Task, model: nn.Module) -> float:
        clock[0] += 100.0
        return 1.0

    monkeypatch.setattr(harness, "time", SimpleNamespace(process_time=lambda: clock[0]))
    monkeypatch.setattr(Task, "training_loss", slow_loss)
    run = harness.Run(tiny_task(), Contestant("one", "one", lambda model, lr, seed: OneSecond(), (1.0,)), 1.0, 0)
    harness.interleave([run])
    assert run.curve.seconds == [float(i) for i in run.curve.iterations]


def test_training_loss_is_evaluated_in_evaluation_mode_and_leaves_the_model_as_it_was() -> None:
    task = tiny_task()
    model = nn.Sequential(Linear(), nn.Dropout(0.5))
    inputs, outputs = task.data()
    expected = nn.functional.mse_loss(model[0](inputs), outputs).detach()
    assert task.training_loss(model) == pytest.approx(float(expected))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# Reports.


def made_up_results() -> Results:
    def steady(scale: float, seconds_each: float) -> list[Curve]:
        return [curve_of(lambda i: 10 ** (-i / scale), list(range(0, 41, 2)), seconds_each)] * 3

    return Results(
        task="made_up",
        title="made up",
        batch_size=8,
        budget=40,
        targets=(0.1, 0.001),
        seeds=[0, 1, 2],
        tuning_seeds=[9],
        titles={"sgd": "SGD", "kfc": "KFC"},
        grids={"sgd": [0.1, 0.2], "kfc": [0.5]},
        lrs={"sgd": 0.2, "kfc": 0.5},
        tuning={"sgd": {"0.1": [None], "0.2": [33.0]}},
        curves={"sgd": steady(20, 0.1), "kfc": steady(5, 0.3)},
    )


def test_table_gives_medians_and_ratios_to_the_reference() -> None:
    rows = markdown(made_up_results()).splitlines()
    assert "| 0.1 | SGD | 0.2 (edge of grid) | 20 | 4.0 | 2.0 | 1.3 |" in rows
    assert "| 0.1 | KFC | 0.5 | 5 | 1 | 1.5 | 1 |" in rows
    assert "| 0.001 | SGD | 0.2 (edge of grid) | - | never | - | never |" in rows
    assert "SGD: iterations by lr: 0.1: -, 0.2: 33." in rows


def test_table_names_the_runs_that_failed_behind_a_good_median() -> None:
    results = made_up_results()
    assert "never reached" not in markdown(results)
    results.curves["sgd"] = [*results.curves["sgd"][:2], Curve([0, 40], [0.0, 4.0], [1.0, 1.5])]
    assert "SGD: 1 of 3 reported runs never reached 0.1, 1 ended above their first loss" in markdown(results)


def test_results_survive_their_file(tmp_path: Path) -> None:
    results = made_up_results()
    results.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert {**vars(loaded), "targets": tuple(loaded.targets), "curves": None} == {**vars(results), "curves": None}
    assert loaded.curves["sgd"][0].reach(0.1).iterations == pytest.approx(20, rel=1e-3)


def test_benchmark_tunes_on_its_grid_and_writes_results_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "tiny", tiny_task(budget=30))
    # On this task SGD at 1e-9 stands still and at 1e9 explodes: the middle must win.
    monkeypatch.setitem(CONTESTANTS, "sgd", Contestant("sgd", "SGD", CONTESTANTS["sgd"].make, (1e-9, 0.1, 1e9)))
    arguments = ["tiny", "--optimizers", "sgd", "kfc", "--seeds", "0", "1"]
    results = convergence.main([*arguments, "--results", str(tmp_path / "r"), "--plots", str(tmp_path / "p")])
    assert results.lrs == {"sgd": 0.1, "kfc": 0.5}
    assert [len(curves) for curves in results.curves.values()] == [2, 2]
    assert all(curve.iterations[-1] == 30 for curves in results.curves.values() for curve in curves)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["convergence_tiny.json", "convergence_tiny.md"]
    assert (tmp_path / "p" / "convergence_tiny.svg").read_text().startswith("<?xml")


# Cost of a step.


@pytest.mark.parametrize(("t_cov", "t_inv"), [(10, 100), (10, 20), (1, 1), (5, 5)])
def test_amortised_cost_is_the_mean_over_the_steps_of_a_schedule(t_cov: int, t_inv: int) -> None:
    between, factors, refresh = 1.1, 4.0, 7.0
    schedule = RefreshSchedule(t_cov, t_inv, warmup_steps=0)

    def cost(step: int) -> float:
        if schedule.inverses_due(step):
            return refresh
        return factors if schedule.factors_due(step) else between

    expected = fmean(cost(step) for step in range(t_inv, 2 * t_inv))
    assert step_cost.amortised(between, factors, refresh, t_cov, t_inv) == pytest.approx(expected)


def test_each_kind_of_step_does_what_its_name_says() -> None:
    for kind, (t_cov, t_inv) in {"between": (False, False), "factors": (True, False), "refresh": (True, True)}.items():
        stepper = step_cost.KINDS[kind](nn.Linear(3, 2))
        assert isinstance(stepper, step_cost.KFCStepper)
        schedule = stepper.kfc.settings.schedule
        for step in range(2, 60):
            assert (schedule.factors_due(step), schedule.inverses_due(step)) == (t_cov, t_inv), kind


def test_costs_are_ratios_to_the_same_rounds_sgd_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    seconds = {"sgd": 1.0, "slow": 3.0}

    def taking(name: str) -> Callable[[nn.Module], SimpleNamespace]:
        def step(compute_loss: Callable[[], Tensor]) -> None:
            # The whole machine slows down as time goes by.
            clock[0] += seconds[name] * (1 + clock[0] / 1000)

        return lambda model: SimpleNamespace(step=step)

    monkeypatch.setattr(step_cost, "KINDS", {name: taking(name) for name in seconds})
    costs = step_cost.measure_time(step_cost.WORKLOADS["autoencoder"], 20, 1, lambda: clock[0])
    assert costs["sgd"] == 1
    assert costs["slow"] == pytest.approx(3, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_growth_counts_what_a_step_held_only_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(compute_loss: Callable[[], Tensor]) -> None:
        torch.ones(64 * 2**20, dtype=torch.uint8)

    monkeypatch.setitem(step_cost.KINDS, "greedy", lambda model: SimpleNamespace(step=step))
    grown = step_cost.memory_growth(step_cost.WORKLOADS["autoencoder"], "greedy", 1)
    assert 60 * 2**20 < grown < 80 * 2**20


# Networks.


def test_resnet20_has_its_papers_parameters_and_halves_the_image_twice() -> None:
    model = resnet20().eval()
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert sum(p.numel() for p in model.parameters()) == convolutions + norms + 65 * 10  # He et al.: 0.27 million
    sizes = []
    for module in model.children():
        module.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [sizes[i] for i in (2, 5, 8, 11)] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_deep_autoencoder_has_its_papers_widths_and_a_linear_code() -> None:
    layers = list(deep_autoencoder())
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    assert [module.in_features for module in linear] + [784] == list(AUTOENCODER_WIDTHS)
    code = layers.index(linear[3])
    assert not isinstance(layers[code + 1], nn.ReLU)
    assert sum(isinstance(module, nn.ReLU) for module in layers) == 6
