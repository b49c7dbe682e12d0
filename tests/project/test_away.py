"""The tasks away from home: they build, one step on each is finite, and their halves are disjoint and complete."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.away import contest, data
from benchmarks.away.averages import SPACING, AveragedRun
from benchmarks.away.contestants import AWAY_CONTESTANTS
from benchmarks.away.records import Entry, Outcome, Record, ahead, missed, table
from benchmarks.away.tasks import AWAY, CHOOSING, HELD_BACK, MEASURED, belonging, evidence_bound
from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.data import Split
from benchmarks.contest.harness import BLOCK, Run
from benchmarks.contest.optimizers import AveragingStepper, Stepper
from benchmarks.contest.tasks import Goal, Task
from benchmarks.paths import RESULTS


def test_the_halves_are_disjoint_and_complete() -> None:
    assert not set(CHOOSING) & set(HELD_BACK)
    assert sorted(CHOOSING + HELD_BACK) == sorted(AWAY)
    assert len(AWAY) >= 10
    assert abs(len(CHOOSING) - len(HELD_BACK)) <= 1


@pytest.mark.parametrize("half", [CHOOSING, HELD_BACK])
def test_each_half_has_batch_norm_a_table_and_a_model_of_sequences(half: tuple[str, ...]) -> None:
    networks = {name: list(AWAY[name].make_model().modules()) for name in half}
    kinds = {type(module) for modules in networks.values() for module in modules}
    assert nn.BatchNorm2d in kinds
    assert kinds & {nn.GRU} or any(type(module).__name__ == "Attention" for m in networks.values() for module in m)
    assert any(name.startswith("table") for name in half)


# SGD, so that nothing of what the benchmark compares is run on the half that is held back.
@pytest.mark.slow
@pytest.mark.parametrize("name", AWAY)
def test_one_step_is_finite_and_changes_the_loss(name: str) -> None:
    task = AWAY[name]
    assert 32 <= task.batch_size <= 1024
    assert len(task.data().train_inputs) >= max(MEASURED, task.batch_size)
    run = Run(task, CONTESTANTS["sgd"], 1e-3, seed=0)
    run.advance(1)
    first, second = run.curve.losses
    assert torch.isfinite(torch.tensor([first, second])).all()
    assert first != second


def test_evidence_bound_is_the_divergence_of_two_normals_plus_the_misfit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, pixels = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    mean, log_variance = torch.randn(2, 3, 4, generator=generator)
    codes = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(codes, torch.distributions.Normal(0.0, 1.0)).sum(1)
    shares = torch.sigmoid(logits)
    misfit = -(pixels * shares.log() + (1 - pixels) * (1 - shares).log()).sum(1)
    assert torch.allclose(evidence_bound((logits, mean, log_variance), pixels), (misfit + divergence).mean())


def test_info_nce_is_small_where_pairs_belong_together_and_that_of_chance_where_all_codes_are_equal() -> None:
    together = torch.eye(6)[:, None].expand(-1, 2, -1)
    assert float(belonging(together, torch.arange(6), temperature=0.01)) < 1e-6
    assert float(belonging(torch.ones(6, 2, 3), torch.arange(6))) == pytest.approx(torch.tensor(6.0).log().item())


def test_patches_are_cut_from_the_photograph() -> None:
    photo = torch.arange(3 * 7 * 9).float().reshape(3, 7, 9)
    cut = data.patches(photo, 20, 4, torch.Generator().manual_seed(0))
    whole = photo.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 4, 4)
    assert cut.shape == (20, 3, 4, 4)
    assert all((whole == patch).flatten(1).all(1).any() for patch in cut)


# Averages, records and the contest, on a task and contestants made up so that the right answer is known.


class Line(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


def line_task(target: float, budget: int = 40) -> Task:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(20, 3, generator=generator)
    outputs = inputs @ torch.randn(3, 2, generator=generator)
    split = Split(inputs, outputs, inputs[:4], outputs[:4])
    return Task("line", "a line", Line, nn.functional.mse_loss, lambda: split, {8: Goal((target,), budget)}, 8)


def test_a_run_s_averages_are_those_that_the_contest_evaluates_one_at_a_time() -> None:
    task, sgd = line_task(1e-9), CONTESTANTS["sgd"]
    both = AveragedRun(task, sgd, 0.05, seed=3)
    both.advance(12)

    def alone(decay: float | None) -> list[float]:
        def make(model: nn.Module, lr: float, seed: int) -> Stepper:
            stepper = sgd.make(model, lr, seed)
            return stepper if decay is None else AveragingStepper(stepper, model, decay)

        run = Run(task, replace(sgd, make=make), 0.05, seed=3, spacing=SPACING)
        run.advance(12)
        return run.curve.losses

    for name, decay in (("none", None), ("0.8", 0.8), ("0.9", 0.9)):
        assert both.curves[name].losses == pytest.approx(alone(decay), rel=1e-5)
    assert both.curve.losses == [min(losses) for losses in zip(*(c.losses for c in both.curves.values()), strict=True)]


@pytest.mark.slow
def test_each_average_is_measured_up_to_the_target_and_a_run_goes_on_for_those_that_are_reported() -> None:
    task = line_task(1e-2, budget=100)
    record = Record("line", "a line", 8, 1e-2, 100)
    for name, average in (("kfc", None), ("sgd", "none"), ("adam", "0.9")):
        record.entries[name] = Entry(name, {}, 0.3, average)
    contest.compete(task, [AWAY_CONTESTANTS[name] for name in ("kfc", "sgd", "adam")], record, seed=1)
    outcomes = {name: entry.runs["1"] for name, entry in record.entries.items()}
    assert all(value.iterations is not None and value.loss <= 1e-2 for value in outcomes["kfc"].values())
    assert outcomes["sgd"]["none"].iterations is not None
    assert outcomes["adam"]["0.9"].iterations is not None
    assert all(value.steps <= outcomes["adam"]["0.9"].steps + BLOCK for value in outcomes["adam"].values())


def test_schedule_free_is_evaluated_at_its_own_average_and_goes_on_from_where_it_was() -> None:
    task = line_task(1e-3)
    run = AveragedRun(task, AWAY_CONTESTANTS["schedule_free"], 0.05, seed=3)
    run.advance(5)
    optimizer = run._stepper._stepper._optimizer
    before = [p.clone() for p in run.model.parameters()]
    own = run._stepper.evaluated(run.model)["none"]
    for now, earlier in zip(run.model.parameters(), before, strict=True):
        assert torch.allclose(now, earlier, atol=1e-6)
    # x of Defazio et al. 2024 (arXiv:2405.15682), from y = beta x + (1 - beta) z.
    for x, y in zip(own.parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(x, (y - 0.1 * optimizer.state[y]["z"]) / 0.9, atol=1e-5)


@pytest.mark.slow
def test_the_search_takes_the_rate_and_the_average_with_the_fewest_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "EXTENSIONS", 4)
    task = line_task(1e-2, budget=100)
    entry = Entry("SGD")
    contest.search(task, replace(CONTESTANTS["sgd"], grid=(0.001, 0.003, 0.009)), entry)
    assert len(entry.search) > 3  # the best was at the edge
    reached = {
        (float(lr), average): math.inf if value is None else value
        for lr, values in entry.search.items()
        for average, value in values.items()
    }
    assert reached[float(f"{entry.lr:.3g}"), entry.average] == min(reached.values()) < math.inf


def test_at_home_the_search_is_among_the_tuned_rate_and_twice_that() -> None:
    muon = AWAY_CONTESTANTS["muon"]
    tuned = json.loads((RESULTS / "contest_conv_b512.json").read_text())["lrs"]["muon"]
    assert contest.with_searched_rates(contest.HOME["conv_b512"], muon).grid == (tuned, 2 * tuned)
    assert contest.with_searched_rates(AWAY["vae"], muon) == muon
    entry = Entry("SGD")
    contest.search(line_task(1e-2, budget=100), replace(CONTESTANTS["sgd"], grid=(0.001, 0.002)), entry)
    assert list(entry.search) == ["0.001", "0.002"]  # the best is at the edge


@pytest.mark.slow
def test_what_was_measured_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = line_task(1e-2)
    names = ("kfc", "sgd")
    contest.run_missing([task], [AWAY_CONTESTANTS[name] for name in names], (0, 1), tmp_path, ())
    record = contest.load_record(tmp_path, task)
    assert all(set(record.entries[name].runs) == {"0", "1"} for name in names)
    copied = tmp_path / "copy.json"
    record.save(copied)
    assert Record.load(copied) == record
    monkeypatch.setattr(contest, "AveragedRun", None)
    contest.run_missing([task], [AWAY_CONTESTANTS[name] for name in names], (0, 1), tmp_path, ())
    with pytest.raises(ValueError, match=r"delete away_line\.json"):
        contest.load_record(tmp_path, line_task(1e-1))
    with pytest.raises(ValueError, match="has no target"):
        contest.load_record(tmp_path, line_task(-math.inf))


def test_the_table_has_medians_kfc_first_and_names_who_is_ahead() -> None:
    def entry(title: str, iterations: list[float | None], average: str | None) -> Entry:
        runs = {
            str(seed): {
                name: Outcome(value, None if value is None else value / 10, 40, 0.5) for name in ("none", "0.8", "0.9")
            }
            for seed, value in enumerate(iterations)
        }
        return Entry(title, {}, 0.1, average, runs)

    record = Record("line", "a line", 8, 0.25, 40)
    record.entries["sgd"] = entry("SGD", [5.0, 30.0, 7.0], "0.9")
    record.entries["adam"] = entry("Adam", [None, 30.0, None], "none")
    record.entries["kfc"] = entry("KFC", [20.0, 10.0, None], None)
    lines = table([record], ("kfc", "sgd", "adam"), (0, 1, 2)).splitlines()
    assert [line.replace("\u00a0", " ") for line in lines] == [
        "| task, batch, loss | line, 8, 0.25 |",
        "|---|---|",
        "| KFC | 20 / 2.0 |",
        "| KFC, averaged 0.8 | 20 / 2.0 |",
        "| KFC, averaged 0.9 | 20 / 2.0 |",
        "| SGD | **7 / 0.70 (0.9)** |",
        "| Adam | - |",
    ]
    assert missed([record], ("kfc", "sgd", "adam"), (0, 1, 2)) == [
        "- line, iterations: KFC at its defaults 20; ahead of it SGD 7.",
        "- line, CPU seconds: KFC at its defaults 2; ahead of it SGD 0.7.",
    ]
    assert ahead([record], ("kfc", "sgd", "adam"), (0, 1, 2))[0] == (
        "- KFC: fewest iterations on 0, least time on 0 of 1."
    )
    del record.entries["sgd"]
    assert ahead([record], ("kfc", "sgd", "adam"), (0, 1, 2)) == [
        "- KFC: fewest iterations on 1, least time on 1 of 1.",
        "- KFC, averaged 0.8: fewest iterations on 1, least time on 1 of 1.",
        "- KFC, averaged 0.9: fewest iterations on 1, least time on 1 of 1.",
    ]


@pytest.mark.slow
def test_every_task_has_a_target_below_its_first_loss() -> None:
    for task in AWAY.values():
        first = task.training_loss(task.make_model())
        assert 0 < task.targets[-1] < first, task.name
