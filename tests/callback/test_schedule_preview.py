"""The preview of a schedule gives what the schedule does, and leaves no trace."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

from lightning_kfc.callback.schedule_preview import MOST_STEPS, Schedule, preview, schedules_of
from tests.helpers.harness import QUIET, Classifier, Watch, fit

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
STEPS = 60


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: OneCycleLR(o, 0.5, STEPS),
    "cycles": lambda o: CyclicLR(o, 0.1, 0.5, 7, mode="exp_range"),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o, 0.001), CosineAnnealingLR(o, 50)], [5]),
    "chain": lambda o: ChainedScheduler([ConstantLR(o), ExponentialLR(o, 0.9)]),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 9),
    "steps": lambda o: StepLR(o, 20),
    "polynomial": lambda o: PolynomialLR(o, 40),
    "averaging": lambda o: SWALR(o, 0.05),
}


def two_groups() -> SGD:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    return SGD([{"params": first.parameters(), "lr": 0.5}, {"params": second.parameters(), "lr": 0.1}], momentum=0.5)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_preview_has_the_values_that_training_will_have_and_changes_nothing(name: str, every: int) -> None:
    optimizer = two_groups()
    schedule = SCHEDULES[name](optimizer)
    before = copy.deepcopy((optimizer.state_dict(), repr(schedule.state_dict())))
    state, python_state = torch.get_rng_state(), random.getstate()
    planned = preview(optimizer, optimizer.param_groups[1:], [Schedule(schedule, every)], STEPS)
    assert (optimizer.state_dict(), repr(schedule.state_dict())) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert planned is not None
    rates, momenta = [], []
    for step in range(1, STEPS + 1):
        rates.append(optimizer.param_groups[1]["lr"])
        momenta.append(optimizer.param_groups[1]["momentum"])
        optimizer.step()
        if step % every == 0 and step < STEPS:
            schedule.step()
    assert (list(planned.rates), list(planned.momenta), planned.whole) == (rates, momenta, True)


class Counted(LRScheduler):
    """A user's own, whose code is not ours to run."""

    def get_lr(self) -> list[float]:
        return [0.1, 0.1]


CALLS: list[int] = []


def counted(step: int) -> float:
    CALLS.append(step)
    return 1.0


@pytest.mark.parametrize(
    "make",
    [
        Counted,
        lambda o: LambdaLR(o, counted),
        lambda o: MultiplicativeLR(o, counted),
        lambda o: CyclicLR(o, 0.1, 0.5, 7, scale_fn=counted, scale_mode="cycle"),
        lambda o: SequentialLR(o, [ConstantLR(o), LambdaLR(o, counted)], [5]),
        ReduceLROnPlateau,
    ],
)
def test_schedules_with_code_or_state_of_the_users_own_are_left_alone(make: Callable[[Any], Any]) -> None:
    optimizer = two_groups()
    schedule = make(optimizer)
    calls = len(CALLS)
    assert preview(optimizer, optimizer.param_groups, [Schedule(schedule)], STEPS) is None
    assert len(CALLS) == calls


def test_a_schedule_whose_steps_are_not_known_is_left_alone() -> None:
    optimizer = two_groups()
    for every in (math.nan, math.inf):
        assert preview(optimizer, optimizer.param_groups, [Schedule(StepLR(optimizer, 5), every)], STEPS) is None


def test_a_preview_ends_with_the_schedule_and_is_of_bounded_length() -> None:
    optimizer = two_groups()
    short = preview(optimizer, optimizer.param_groups, [Schedule(OneCycleLR(optimizer, 0.5, 10))], STEPS)
    assert short is not None
    assert (len(short.rates), short.whole) == (11, False)
    for steps in (math.inf, 10 * MOST_STEPS):
        long = preview(two := two_groups(), two.param_groups, [], steps)
        assert long is not None
        assert (len(long.rates), long.whole) == (MOST_STEPS, False)


def test_a_scheduler_that_cannot_be_copied_is_left_alone_without_a_warning() -> None:
    optimizer = two_groups()
    schedule = StepLR(optimizer, 5)
    schedule.lock = (line for line in "generators cannot be copied")  # type: ignore[attr-defined]  # not its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preview(optimizer, optimizer.param_groups, [Schedule(schedule)], STEPS) is None


@pytest.mark.parametrize(
    ("options", "accumulated", "expected"),
    [
        ({}, 1, 3.0),
        ({"interval": "step"}, 1, 1.0),
        ({"interval": "step", "frequency": 2}, 1, 2.0),
        ({"frequency": 2}, 2, 4.0),
    ],
)
def test_the_steps_between_those_of_a_scheduler_are_the_trainers(
    options: dict[str, Any], accumulated: int, expected: float
) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2), **options}}

    class Own(Scheduled):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    found: list[Schedule] = []

    def look(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found.extend(schedules_of(trainer, module, trainer.optimizers[0]))

    for module in (Scheduled(), Own()):
        fit(module, callbacks=[Watch("on_train_start", look)], accumulate_grad_batches=accumulated)
    assert found[0].every == expected
    assert math.isnan(found[1].every)
