"""What is said of the optimizer beside the callback: something of a poor partner, nothing of the recommended one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from lightning_kfc import KFCCallback
from lightning_kfc.callback.optimizer_advice import Advice, advice
from lightning_kfc.settings import Settings
from tests.helpers.harness import QUIET, Classifier, fit

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

Make = Callable[[list[nn.Parameter]], Optimizer]


class Lion(SGD):
    """Of another package: told by its ``betas``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-4)
        self.defaults["betas"] = (0.9, 0.99)


def said(make: Make, *, rule: str = "natural", damping: Any = "auto", **options: Any) -> str:
    optimizer = make(list(nn.Linear(2, 2).parameters()))
    return text(advice(optimizer, Settings(rule=rule, damping=damping, kl_clip="auto"), **options))


def text(found: list[Advice]) -> str:
    return " ".join(each.text for each in found)


@pytest.mark.parametrize(
    ("make", "rule", "options", "expected"),
    [
        (lambda p: Adam(p), "natural", {}, "Adam rescales each coordinate .* preconditioned twice"),
        (lambda p: AdamW(p), "natural", {}, "AdamW rescales"),
        (lambda p: RMSprop(p), "natural", {}, "RMSprop rescales"),
        (lambda p: Lion(p), "natural", {}, "Lion rescales"),
        (lambda p: Adam(p, weight_decay=0.1), "natural", {}, "Adam adds its weight decay"),
        (lambda p: SGD(p, lr=0.01), "natural", {}, r"learning rate of 0.01 .* SGD\(lr=0.5, momentum=0.5\)"),
        (lambda p: SGD(p, lr=3.0), "natural", {}, "learning rate of 3 is far"),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "natural", {"steps": 100}, "momentum of 0.9 averages over 10 steps"),
        (lambda p: Adam(p), "adam", {}, r"makes Adam's step itself.* Use SGD\(lr=0.5, momentum=0.5\)"),
        (lambda p: SGD(p, lr=0.5, momentum=0.9), "adam", {}, "learning rate of 0.5, with a momentum of 0.9, is far"),
        (lambda p: SGD(p, lr=0.02), "adam", {}, r"learning rate of 0.02 .* SGD\(lr=0.5, momentum=0.5\)"),
        (lambda p: SGD(p, lr=0.5), "adam", {"damping": 0.1}, "damping has no part"),
    ],
)
def test_a_poor_partner_is_told_with_the_recommended_one(
    make: Make, rule: str, options: dict[str, Any], expected: str
) -> None:
    assert re.search(expected, said(make, rule=rule, **options))


@pytest.mark.parametrize(
    ("make", "rule", "options"),
    [
        (lambda p: SGD(p, lr=0.5, momentum=0.5), "natural", {"steps": 10}),
        (lambda p: SGD(p, lr=0.5, momentum=0.5, nesterov=True, weight_decay=1e-4, fused=True), "natural", {}),
        (lambda p: SGD(p, lr=0.1), "natural", {"steps": 10}),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "natural", {"steps": 2000}),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "natural", {"steps": math.inf}),
        (lambda p: SGD(p, lr=0.5, momentum=0.5), "natural", {"damping": 0.1}),
        (lambda p: SGD(p, lr=0.5, momentum=0.5), "adam", {}),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), "adam", {"steps": 10}),
        (lambda p: SGD(p, lr=1.0), "adam", {"steps": 10}),
        # Of what was never measured, nothing is said.
        (lambda p: torch.optim.ASGD(p, lr=0.01), "natural", {}),
        (lambda p: Adam(p), "natural", {"groups": []}),
    ],
)
def test_of_the_recommended_partner_and_its_like_nothing_is_said(make: Make, rule: str, options: Any) -> None:
    assert said(make, rule=rule, **options) == ""


def test_of_adamw_and_decoupled_decay_only_the_rescaling_is_told() -> None:
    assert "weight decay" not in said(lambda p: AdamW(p, weight_decay=0.1))
    optimizer = Adam(list(nn.Linear(2, 2).parameters()), weight_decay=0.1)
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    assert "weight decay" not in text(advice(optimizer, Settings()))


@pytest.mark.parametrize(
    ("lr", "schedule"),
    [
        (0.5, lambda o: OneCycleLR(o, max_lr=0.5, total_steps=100, div_factor=100)),
        (0.5, lambda o: CosineAnnealingLR(o, 100)),
        (0.5, lambda o: LinearLR(o, start_factor=0.001)),
        (0.5, lambda o: LambdaLR(o, lambda step: min(1.0, step / 1000))),
        (0.5, lambda o: SequentialLR(o, [LinearLR(o, start_factor=0.001), CosineAnnealingLR(o, 9)], [5])),
        (0.001, lambda o: CyclicLR(o, base_lr=0.001, max_lr=0.5, cycle_momentum=False)),
    ],
)
def test_a_schedule_that_warms_up_is_judged_by_where_it_leads(lr: float, schedule: Callable[..., LRScheduler]) -> None:
    optimizer = SGD(list(nn.Linear(2, 2).parameters()), lr=lr, momentum=0.5)
    settings = Settings(damping="auto", kl_clip="auto")
    scheduler = schedule(optimizer)
    assert optimizer.param_groups[0]["lr"] < 0.05 or isinstance(scheduler, CosineAnnealingLR)
    assert advice(optimizer, settings, schedulers=[scheduler]) == []


def test_a_schedule_that_never_comes_near_is_told() -> None:
    optimizer = SGD(list(nn.Linear(2, 2).parameters()), lr=0.5, momentum=0.5)
    scheduler = OneCycleLR(optimizer, max_lr=0.01, total_steps=100)
    optimizer.param_groups[0]["initial_lr"] = 0.0004
    assert "learning rate of 0.01" in text(advice(optimizer, Settings(), schedulers=[scheduler]))


def lines(caplog: pytest.LogCaptureFixture, make: Make, **options: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(Classifier(optimizer=lambda p: make(list(p))), kfc=KFCCallback(**options), max_steps=2)
    return [line for line in caplog.messages if line.startswith("KFCCallback:")]


def test_the_callback_tells_once_when_training_starts(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines(caplog, lambda p: Adam(p))
    assert "preconditioned twice" in line
    (line,) = lines(caplog, lambda p: SGD(p, lr=0.1, momentum=0.9))
    assert "much of a run of 2, " in line
    assert lines(caplog, lambda p: SGD(p, lr=0.5, momentum=0.5)) == []
    assert lines(caplog, lambda p: SGD(p, lr=0.5, momentum=0.5), rule="adam") == []


def test_groups_without_preconditioned_parameters_are_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        # The convolution is left out, and its rate is its own.
        return SGD([{"params": parameters[:2], "lr": 1e-5}, {"params": parameters[2:], "lr": 0.5}], momentum=0.5)

    assert lines(caplog, make, exclude="net.0") == []
    assert lines(caplog, lambda p: SGD(p, lr=1e-5), exclude="net.0")


@pytest.mark.parametrize(
    ("optimizer", "rule", "steps", "severe"),
    [
        ({"lr": 0.5, "momentum": 0.9}, "natural", 90, True),
        ({"lr": 0.1, "momentum": 0.9}, "natural", 90, False),
        ({"lr": 0.5, "momentum": 0.9}, "natural", 9000, False),
        ({"lr": 3.0, "momentum": 0.5}, "natural", 90, False),
        ({"lr": 0.5, "momentum": 0.9}, "adam", 90, False),
    ],
)
def test_only_steps_that_momentum_makes_far_too_long_are_warned_of(
    optimizer: dict[str, float], rule: str, steps: int, severe: bool
) -> None:
    made = SGD(nn.Linear(2, 2).parameters(), **optimizer)
    found = advice(made, Settings(rule=rule, damping="auto", kl_clip="auto"), steps=steps)
    assert any(each.severe for each in found) == severe


def test_the_callback_warns_where_training_would_be_clearly_worse() -> None:
    module = Classifier(optimizer=lambda p: SGD(p, lr=0.5, momentum=0.9))
    with pytest.warns(UserWarning, match="a momentum of 0.9 averages over 10 steps, much of a run of 2,"):
        fit(module, kfc=KFCCallback(), max_steps=2)
