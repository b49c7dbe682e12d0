"""Each rule returns advice on a run built to trigger it, none on a similar run, and keeps its thresholds."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFCCallback, Logging, monitoring
from lightning_kfc.monitoring.advice import (
    RULES,
    Adviser,
    Facts,
    clip_sets_the_step,
    damping_above_curvature,
    few_rows,
    gradient_clipping_sets_the_step,
    inverses_take_long,
    longer_period,
    many_nonfinite_steps,
    many_undone_steps,
    small_coverage,
    statistics_take_long,
)
from lightning_kfc.monitoring.messages import LOGGER
from lightning_kfc.reporting import diagnostics
from tests.helpers.harness import QUIET, Classifier, dense_net, fit, images, loader

pytestmark = [
    *(pytest.mark.filterwarnings(entry) for entry in QUIET),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

# Pure.


@pytest.mark.parametrize(
    ("cut", "steps", "speaks"), [(95, 100, True), (94, 100, False), (99, 99, False), (100, 100, True), (0, 100, False)]
)
def test_the_clip_rule_warns_from_95_of_the_last_100_steps_on(cut: int, steps: int, speaks: bool) -> None:
    facts = Facts(clip_factors=[0.0999] * cut + [0.1] * (steps - cut), kl_clip=0.03)
    said = clip_sets_the_step(facts)
    assert (said is not None) == speaks
    if said is not None:
        assert f"{cut}% of the last 100 steps" in said
        assert "Raise kl_clip=0.03, or lower the learning rate." in said
        automatic = clip_sets_the_step(replace(facts, automatic_kl_clip=True))
        assert automatic is not None
        assert "raise" not in automatic
        assert clip_sets_the_step(replace(facts, kl_clip=None)) is None


@pytest.mark.parametrize(
    ("little", "steps", "momentum", "speaks"),
    [(26, 50, 0.5, True), (25, 50, 0.5, False), (49, 49, 0.5, False), (50, 50, 0.9, False), (0, 50, 0.0, False)],
)
def test_the_rule_of_clipped_gradients_warns_where_half_of_the_updates_lose_nearly_all_of_their_length(
    little: int, steps: int, momentum: float, speaks: bool
) -> None:
    factors = [0.01] * little + [0.4] * (steps - little)
    facts = Facts(gradient_clip_factors=factors, momentum=momentum, kl_clip=0.1)
    said = gradient_clipping_sets_the_step(facts)
    assert (said is not None) == speaks
    if said is not None:
        assert "shortened half of the last 50 updates to less than 0.01 of their length" in said
        assert "Leave gradient clipping out: kl_clip bounds every update." in said
        without = gradient_clipping_sets_the_step(replace(facts, kl_clip=None))
        assert without is not None
        assert "kl_clip='auto' bounds updates" in without


def test_the_damping_rule_names_the_layers() -> None:
    assert damping_above_curvature(Facts()) is None
    facts = Facts(below_damping=[f"conv{i}" for i in range(1, 7)], layers=9, damping=0.5)
    said = damping_above_curvature(facts)
    assert said is not None
    assert "damping (0.5)" in said
    assert "6 of 9 layers (conv1, conv2, conv3, conv4 and 2 more)" in said
    assert "Lower the damping" in said
    assert damping_above_curvature(replace(facts, automatic_damping=True)) is None
    assert damping_above_curvature(replace(facts, damped=False)) is None


@pytest.mark.parametrize(
    ("rule", "part", "option"),
    [
        (inverses_take_long, "inverses", "inverse_every_n_steps"),
        (statistics_take_long, "statistics", "factor_every_n_steps"),
    ],
)
def test_the_rules_of_time_speak_above_a_quarter_and_name_the_period(rule: Any, part: str, option: str) -> None:
    facts = Facts(timed_steps=50, time_shares={part: 0.45}, factor_every_n_steps=10, inverse_every_n_steps=20)
    assert f"{part} take 45% of the step. Set {option} to " in str(rule(facts))
    assert rule(replace(facts, timed_steps=39)) is None
    assert rule(replace(facts, time_shares={part: 0.25})) is None
    assert rule(replace(facts, time_shares={part: 0.2501})) is not None
    assert rule(replace(facts, time_shares={})) is None


def test_a_longer_period_brings_the_share_to_what_is_wanted() -> None:
    for period, share in ((20, 0.45), (1, 0.9), (7, 0.3)):
        other, cost = 1 - share, share * period
        found = longer_period(period, share, 0.1)
        assert cost / found / (other + cost / found) <= 0.1 + 1e-9
        assert cost / (found - 1) / (other + cost / (found - 1)) > 0.1
    # Inverses only change where factors have.
    facts = Facts(timed_steps=50, time_shares={"inverses": 0.45}, factor_every_n_steps=10, inverse_every_n_steps=20)
    assert "to 150 (now 20)" in str(inverses_take_long(facts))


@pytest.mark.parametrize(("undone", "steps", "speaks"), [(5, 50, True), (4, 20, False), (5, 51, False)])
def test_five_undone_steps_and_a_tenth_of_all_are_many(undone: int, steps: int, speaks: bool) -> None:
    assert (many_undone_steps(Facts(undone_steps=undone, steps=steps)) is not None) == speaks


def test_undone_steps_are_not_blamed_on_a_learning_rate_without_effect() -> None:
    facts = Facts(undone_steps=9, steps=21, clip_factors=[0.006] * 11 + [1.0] * 10)
    assert many_undone_steps(facts) is None
    # Plain gradients are not clipped.
    assert many_undone_steps(replace(facts, plain_parameters=1)) is not None
    assert many_undone_steps(replace(facts, clip_factors=[0.006] * 10 + [1.0] * 11)) is not None


def test_less_than_half_of_the_parameters_is_a_small_coverage() -> None:
    facts = Facts(covered_parameters=49, trainable_parameters=100)
    assert "only 49%" in str(small_coverage(facts))
    assert small_coverage(replace(facts, covered_parameters=50)) is None
    assert small_coverage(replace(facts, chosen_layers=True)) is None
    assert small_coverage(Facts(covered_parameters=0, trainable_parameters=0, chosen_layers=True)) is None


@pytest.mark.parametrize(
    ("skipped", "steps", "scaler", "speaks"),
    [(5, 95, False, True), (4, 10, False, False), (5, 96, False, False), (9, 20, True, False), (10, 190, True, True)],
)
def test_many_skipped_steps_are_a_twentieth_and_more_with_a_scaler(
    skipped: int, steps: int, scaler: bool, speaks: bool
) -> None:
    said = many_nonfinite_steps(Facts(nonfinite_steps=skipped, steps=steps, gradient_scaler=scaler))
    assert (said is not None) == speaks
    if said is not None:
        assert ("bf16-mixed" in said) == scaler


def test_a_rule_is_heard_once() -> None:
    adviser = Adviser()
    facts = Facts(undone_steps=50, steps=100)
    assert len(adviser.new(facts)) == 1
    assert adviser.new(facts) == []
    both = adviser.new(replace(facts, covered_parameters=0))
    assert len(both) == 1
    assert len(adviser.given) == 2


def test_nothing_is_reported_of_a_training_that_goes_well() -> None:
    assert [rule(Facts(steps=1000, clip_factors=[1.0] * 100, timed_steps=900)) for rule in RULES] == [None] * len(RULES)


# On real runs.


def advice(callback: KFCCallback, module: Classifier | None = None, *, steps: int = 110, **options: Any) -> list[str]:
    """The advice of a training."""
    torch.manual_seed(1)
    module = Classifier(dense_net()) if module is None else module
    given: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: given.append(record.getMessage())  # type: ignore[method-assign]  # of this one alone
    LOGGER.addHandler(handler)
    try:
        fit(module, kfc=callback, data=loader(images(200)), max_steps=steps, **{"log_every_n_steps": 5, **options})
    finally:
        LOGGER.removeHandler(handler)
    return [line.removeprefix("KFC advice: ") for line in given if line.startswith("KFC advice: ")]


def sgd(lr: float, momentum: float = 0.0) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def spoken(rule: str, said: list[str]) -> bool:
    return any(rule in sentence for sentence in said)


def test_a_learning_rate_far_beyond_the_bound_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (monitoring.advice, diagnostics):
        monkeypatch.setattr(module, "CUT_STEPS", 20)
    options: dict[str, Any] = {"damping": 0.01, "kl_clip": 1e-6}
    assert spoken("the KL clip shortened", advice(KFCCallback(**options), steps=25))
    slow = Classifier(dense_net(), optimizer=sgd(1e-5))
    assert not spoken("the KL clip shortened", advice(KFCCallback(**options), slow, steps=25))


def test_a_damping_beyond_all_curvature_is_noticed() -> None:
    said = advice(KFCCallback(damping=1e4, kl_clip=None), steps=20)
    assert spoken("damping (1e+04) is above the largest curvature of 2 of 2 layers (net.1, net.3)", said)
    assert not spoken("damping", advice(KFCCallback(damping=1e-3, kl_clip=0.01), steps=20))


def test_a_damping_that_has_no_part_in_the_steps_is_not_blamed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        callback = KFCCallback(damping=1e4, kl_clip=None, rule="adam")
        assert not spoken("damping", advice(callback, Classifier(dense_net(), optimizer=sgd(0.02)), steps=20))
    # The warning came once, at the start.
    assert sum("does not use `damping`" in record.getMessage() for record in caplog.records) == 1


def wide(units: int = 300) -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, units), nn.Tanh(), nn.Linear(units, 3)))


@pytest.fixture
def few_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice on time takes ten timed steps, and two periods as ever."""
    monkeypatch.setattr(monitoring.advice, "TIMED_STEPS", 10)


@pytest.mark.usefixtures("few_timed_steps")
@pytest.mark.parametrize("period", [1, 20])
def test_inverses_at_every_step_of_a_wide_net_are_noticed(period: int) -> None:
    callback = KFCCallback(damping=0.01, factor_every_n_steps=1, inverse_every_n_steps=period, warmup_steps=1)
    said = advice(callback, wide(600), steps=20 if period == 1 else 45)
    assert spoken("inverses take", said) == (period == 1), said


@pytest.mark.usefixtures("few_timed_steps")
@pytest.mark.parametrize("period", [1, 20])
def test_statistics_at_every_step_are_noticed(period: int) -> None:
    callback = KFCCallback(
        damping=0.01, fisher="exact", factor_every_n_steps=period, inverse_every_n_steps=50, warmup_steps=1
    )
    said = advice(callback, wide(), steps=20 if period == 1 else 45)
    assert spoken("statistics take", said) == (period == 1), said


def test_steps_that_are_taken_back_are_noticed() -> None:
    # The KL clip bounds the covered layers alone; the last one takes plain gradient steps that are far too long.
    fast = Classifier(dense_net(), optimizer=sgd(300.0))
    callback = KFCCallback(exclude="net.3")
    said = advice(callback, fast, steps=40)
    assert spoken("were undone or shortened", said), (said, callback.kfc.events)
    assert not spoken("were undone or shortened", advice(KFCCallback(), steps=40))


class Bare(nn.Module):
    """Its weights are none of a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.1 * torch.randn(30, 36))
        self.last = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.last(torch.tanh(x.flatten(1) @ self.first.T))
        return hidden


def test_a_net_of_bare_parameters_is_noticed() -> None:
    assert spoken("only 8% of the trainable parameters", advice(KFCCallback(), Classifier(Bare()), steps=4))
    assert not spoken("trainable parameters", advice(KFCCallback(exclude="net.3"), steps=4))


@pytest.mark.filterwarnings("ignore:Non-finite norm encountered")
def test_float16_that_overflows_again_and_again_is_noticed() -> None:
    def run(every: int) -> list[str]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        module = Classifier(dense_net())
        module.loss = lambda z, y: F.cross_entropy(z, y) * (torch.inf if len(module.losses) % every == 1 else 1)
        return advice(KFCCallback(), module, steps=44, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    assert spoken("float16 overflows", run(4))
    assert not spoken("skipped", run(10_000))


@pytest.mark.slow
def test_advice_is_reported_once_and_is_in_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        said = advice(
            KFCCallback(damping=1e4, kl_clip=None, logging=Logging(report_dir=str(tmp_path))),
            steps=120,
            log_every_n_steps=1,
        )
    (sentence,) = (line for line in said if "largest curvature" in line)
    assert sum(sentence in record.getMessage() for record in caplog.records) == 1
    assert f"<li>{sentence}</li>" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_training_that_gives_no_occasion_has_none_in_its_report(tmp_path: Path) -> None:
    assert advice(KFCCallback(logging=Logging(report_dir=str(tmp_path))), steps=6) == []
    assert "<h2>Advice</h2><p>None.</p>" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("rows", "steps", "speaks"), [(1, 20, True), (2, 20, True), (1, 19, False), (3, 1000, False), (None, 1000, False)]
)
def test_the_rule_of_few_rows_warns_of_steps_of_one_or_two_examples(rows: int | None, steps: int, speaks: bool) -> None:
    said = few_rows(Facts(fewest_rows=rows, layer_of_fewest_rows="head", steps=steps))
    assert (said is not None) == speaks
    if said is not None and rows is not None:
        assert f"the factors of 'head' come from {rows} row(s) a step" in said
        assert f"accumulate_grad_batches={16 // rows}" in said


@pytest.mark.parametrize(("batch_size", "accumulated", "speaks"), [(1, 1, True), (1, 3, False), (3, 1, False)])
def test_steps_of_one_example_are_advised_on_once(
    batch_size: int, accumulated: int, speaks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = loader(images(90), batch_size=batch_size)
    fit(Classifier(), kfc=KFCCallback(), data=data, max_steps=25, accumulate_grad_batches=accumulated)
    said = [message for message in caplog.messages if "accumulate_grad_batches" in message]
    assert len(said) == speaks
    assert all("'net.3'" in line for line in said)
