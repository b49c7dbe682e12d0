"""Periods that are "auto" keep to the budget, by what the parts of a step are seen to cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_kfc.monitoring.timing as step_times
from lightning_kfc import KFC, KFCCallback, Logging, RefreshTiming
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.estimation.loss_statistics import LossStatistics
from lightning_kfc.rules.natural import NaturalRule
from lightning_kfc.scheduling.automatic_periods import LONGEST, SHORTEST, Costs, candidates, choose_periods
from tests.helpers.harness import QUIET, Classifier, fit, images, loader
from tests.refresh.test_staggering import Training

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

seconds = st.floats(0, 100)
all_costs = st.builds(Costs, st.floats(1e-3, 10), seconds, seconds, seconds)
budgets = st.floats(0.01, 2.0)
period = st.none() | st.integers(1, 400)


@given(all_costs, budgets, period, period)
def test_the_choice_is_the_shortest_within_the_budget_or_the_longest_there_is(
    costs: Costs, budget: float, factors: int | None, inverses: int | None
) -> None:
    chosen = choose_periods(costs, budget, factors, inverses)
    assert chosen.overhead == costs.overhead(chosen.factors, chosen.inverses)
    pairs = list(candidates(factors, inverses))
    assert (chosen.factors, chosen.inverses) in pairs
    if chosen.overhead <= budget:
        assert not [p for p in pairs if sum(p) < chosen.factors + chosen.inverses and costs.overhead(*p) <= budget]
    else:
        assert not [p for p in pairs if costs.overhead(*p) <= budget]
        assert chosen.factors + chosen.inverses == max(map(sum, pairs))


@given(period, period)
def test_what_is_given_stays_and_what_is_free_is_sensible(factors: int | None, inverses: int | None) -> None:
    pairs = list(candidates(factors, inverses))
    assert pairs
    for t_cov, t_inv in pairs:
        assert factors in (None, t_cov)
        assert inverses in (None, t_inv)
        if factors is None:
            assert min(SHORTEST[0], t_inv) <= t_cov <= min(LONGEST[0], t_inv)
        if inverses is None:
            assert t_inv % t_cov == 0
            assert SHORTEST[1] <= t_inv <= max(LONGEST[1], t_cov)


@given(all_costs, budgets, st.floats(1.0, 3.0), st.floats(0.01, 100))
def test_a_larger_budget_is_never_used_for_less_and_only_ratios_count(
    costs: Costs, budget: float, larger: float, scale: float
) -> None:
    chosen, more = choose_periods(costs, budget), choose_periods(costs, budget * larger)
    assert more.factors + more.inverses <= chosen.factors + chosen.inverses
    exact = Costs(*(4.0 * part for part in (costs.plain, costs.each_step, costs.statistics, costs.inverses)))
    assert choose_periods(exact, budget) == chosen


class Clock:
    """A clock that only what we let it moves, by a cost of our choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **costs: float) -> None:
        self.now, self.costs = 0.0, costs
        monkeypatch.setattr(step_times.time, "perf_counter", lambda: self.now)
        for owner, name, part in (
            (Layer, "refreshed", "inverse"),
            (LossStatistics, "__call__", "statistics"),
            (NaturalRule, "updates", "preconditioning"),
        ):
            monkeypatch.setattr(owner, name, self._slow(getattr(owner, name), part))

    def _slow(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += self.costs[part]
            return function(*args, **kwargs)

        return slow

    def pass_by(self, *_: Any) -> None:
        self.now += self.costs["plain"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    # 7 layers: a refresh of all inverses takes 2 seconds.
    return Clock(monkeypatch, plain=1.0, statistics=0.6, inverse=2 / 7, preconditioning=0.02)


def timed(clock: Clock, **settings: Any) -> Training:
    defaults = {"factor_every_n_steps": "auto", "inverse_every_n_steps": "auto", "warmup_steps": 6}
    training = Training(**{**defaults, **settings})
    training.model.register_forward_hook(clock.pass_by)
    return training


def periods(kfc: KFC) -> tuple[int, int]:
    return kfc.schedule.factor_every_n_steps, kfc.schedule.inverse_every_n_steps


@pytest.mark.parametrize("staggered", [True, False])
def test_the_engine_measures_its_parts_and_chooses_once(clock: Clock, staggered: bool, informed: list[str]) -> None:
    training = timed(clock, timing=RefreshTiming(stagger_inverses=staggered))
    training.run(11)
    assert periods(training.kfc) == (10, 20)
    assert informed == []
    training.run(2)
    expected = choose_periods(Costs(1.0, 0.02, 0.6, 2.0), 0.15)
    assert periods(training.kfc) == (expected.factors, expected.inverses) == (13, 26)
    assert informed == [
        "KFC chose factor_every_n_steps=13 and inverse_every_n_steps=26, at which a step takes 14% longer "
        "(timing.max_overhead=0.15)."
    ]
    clock.costs["statistics"] = 50.0
    training.run(70)
    assert periods(training.kfc) == (13, 26)
    assert len(informed) == 1
    # They are in force: in the mean, as many as predicted.
    inverted = [step for step, names in enumerate(training.inverted) for _ in names if step >= 13]
    assert len(inverted) == pytest.approx(70 / 26 * 7, abs=7)


def test_only_what_is_auto_is_chosen(clock: Clock) -> None:
    training = timed(clock, factor_every_n_steps=8)
    training.run(13)
    assert periods(training.kfc) == (8, 40)
    training = timed(clock, inverse_every_n_steps=30)
    training.run(13)
    assert periods(training.kfc) == (10, 30)


def test_where_each_step_costs_more_than_the_budget_the_longest_periods_are_taken_and_it_is_reported(
    clock: Clock, informed: list[str]
) -> None:
    clock.costs["preconditioning"] = 0.5
    training = timed(clock, timing=RefreshTiming(max_overhead=0.2))
    training.run(13)
    assert periods(training.kfc) == LONGEST
    assert len(informed) == 1
    assert "exceeds timing.max_overhead=0.2, although these are the longest useful periods" in informed[0]
    assert "alone take 50%" in informed[0]


def test_statistics_at_every_step_leave_no_other_step_to_measure_and_it_is_chosen_all_the_same(clock: Clock) -> None:
    training = timed(clock, factor_every_n_steps=1, timing=RefreshTiming(max_overhead=0.9))
    training.run(30)
    assert periods(training.kfc) == (1, choose_periods(Costs(1.0, 0.02, 0.6, 2.0), 0.9, factors=1).inverses)


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 8, 12, 20])
def test_a_resumed_run_goes_on_to_the_same_choice_and_keeps_it(clock: Clock, at: int, informed: list[str]) -> None:
    first = timed(clock)
    first.run(at)
    state = copy.deepcopy(first.kfc.state_dict())
    resumed = timed(clock)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.inverted = list(first.inverted)
    assert resumed.kfc.load_state_dict(state) == []
    for training in (first, resumed):
        training.run(40 - at)
    # The step in which it was saved is not timed, which moves the choice by a step where it was one of those needed.
    assert periods(resumed.kfc) == periods(first.kfc) == (13, 26)
    assert len(informed) == 1 + (at <= 12)


def test_numbers_rule_over_a_saved_choice_and_a_state_without_one_is_measured_anew(clock: Clock) -> None:
    first = timed(clock)
    first.run(13)
    fixed = timed(clock, factor_every_n_steps=3, inverse_every_n_steps=6)
    fixed.kfc.load_state_dict(first.kfc.state_dict())
    assert periods(fixed.kfc) == (3, 6)
    fixed = timed(clock, factor_every_n_steps=10, inverse_every_n_steps=20)
    fixed.run(30)
    state = fixed.kfc.state_dict()
    resumed = timed(clock)
    resumed.kfc.load_state_dict(state)
    resumed.run(40)
    # There is no warm-up any more: the inverses of a whole period are added up.
    assert periods(resumed.kfc) == (13, 26)


def test_the_clock_of_the_engine_leaves_that_of_others_alone(clock: Clock) -> None:
    training = timed(clock)
    times = training.kfc.times
    for _ in range(14):
        times.begin_step(torch.device("cpu"))
        training.run(1)
        times.end_step()
    assert times.steps == 14
    assert times.seconds()["forward, backward and the rest"] == pytest.approx(14.0)
    assert times.also is None


def test_deterministic_algorithms_and_a_short_warm_up_are_errors() -> None:
    with pytest.raises(ValueError, match=r"at least 4 steps, got warmup_steps=3\. Give numbers"):
        KFCCallback(inverse_every_n_steps="auto", warmup_steps=3)
    module = Classifier()
    try:
        trainer = pl.Trainer(deterministic=True, logger=False, enable_checkpointing=False, max_steps=1)
        trainer.callbacks.append(KFCCallback(factor_every_n_steps="auto"))
        with pytest.raises(
            ValueError, match=r"'auto' depend on measured times.*Trainer\(deterministic=True\).*Give numbers"
        ):
            trainer.fit(module, loader(images()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.losses == []


def test_the_callback_logs_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    callback = KFCCallback(
        factor_every_n_steps="auto",
        inverse_every_n_steps="auto",
        timing=RefreshTiming(max_overhead=1e6),
        warmup_steps=4,
        logging=Logging(layers=True),
    )
    torch.manual_seed(1)
    logged: list[dict[str, Any]] = []

    class Logger(pl.loggers.Logger):
        name, version = "kept", 0

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.append(dict(metrics))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    with caplog.at_level("INFO"):
        fit(Classifier(), kfc=callback, data=loader(images(200)), max_steps=16, logger=Logger(), log_every_n_steps=1)
    assert periods(callback.kfc) == SHORTEST
    assert sum("KFC chose factor_every_n_steps=5 and inverse_every_n_steps=10" in m for m in caplog.messages) == 1
    found = [m["kfc/inverse_every_n_steps"] for m in logged if "kfc/inverse_every_n_steps" in m]
    assert (found[0], found[-1]) == (20.0, 10.0)
