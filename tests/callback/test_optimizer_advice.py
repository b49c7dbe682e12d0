"""Warnings about optimizers that work against the method, and no others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_kfc import KFCCallback
from lightning_kfc.callback.optimizer_advice import OptimizerWarning, replacement, warnings_for
from lightning_kfc.callback.schedule_preview import Schedule
from lightning_kfc.settings import Settings
from tests.helpers.harness import QUIET, Classifier, fit, loader, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

Make = Callable[[list[nn.Parameter]], Optimizer]


class Lion(SGD):
    """An optimizer of another package, recognised by its ``betas``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-4)
        self.defaults["betas"] = (0.9, 0.99)


def said(make: Make, *, rule: str = "natural", damping: Any = "auto", kl_clip: Any = "auto", **options: Any) -> str:
    optimizer = make(list(nn.Linear(2, 2).parameters()))
    return text(warnings_for(optimizer, Settings(rule=rule, damping=damping, kl_clip=kl_clip), **options))


def text(found: list[OptimizerWarning]) -> str:
    return " ".join(each.text for each in found)


SGD_INSTEAD = r"Replace it by `torch\.optim\.SGD\(self\.parameters\(\), lr=0\.5, momentum=0\.5"


@pytest.mark.parametrize(
    ("make", "rule", "options", "expected"),
    [
        (
            lambda p: Adam(p),
            "natural",
            {},
            rf"Adam rescales each coordinate .* preconditioned twice\. {SGD_INSTEAD}\)`",
        ),
        (lambda p: AdamW(p), "natural", {}, rf"AdamW rescales .* {SGD_INSTEAD}, weight_decay=1e-05\)`"),
        (lambda p: RMSprop(p), "natural", {}, "RMSprop rescales"),
        (lambda p: Lion(p), "natural", {}, "Lion rescales"),
        (
            lambda p: Adam(p, weight_decay=0.1),
            "natural",
            {},
            rf"{SGD_INSTEAD}, weight_decay=0.0001\)`. The weight decay per",
        ),
        (lambda p: SGD(p, lr=0.001), "natural", {}, r"highest learning rate \(0.001\) .* SGD\(lr=0.5, momentum=0.5\)"),
        (
            lambda p: SGD(p, lr=0.1, momentum=0.9),
            "natural",
            {"steps": 5000},
            r"limits .* of 0.9 to 0.5, .*: .* SGD\(lr=0.5, ",
        ),
        (lambda p: SGD(p, lr=2e-4, momentum=0.9), "natural", {}, r"learning rate \(0.0002 with a momentum of 0.9\)"),
        (lambda p: Adam(p), "adam", {}, rf"computes Adam's step.* {SGD_INSTEAD}"),
        (lambda p: SGD(p, lr=0.02), "adam", {}, r"highest learning rate \(0.02\) .* SGD\(lr=0.5, momentum=0.5\)"),
        (lambda p: SGD(p, lr=0.5), "adam", {"damping": 0.1}, "does not use `damping`"),
    ],
)
def test_what_works_against_the_method_is_named_with_its_replacement(
    make: Make, rule: str, options: dict[str, Any], expected: str
) -> None:
    assert re.search(expected, said(make, rule=rule, **options))


@pytest.mark.parametrize(
    ("make", "rule", "options"),
    [
        (lambda p: SGD(p, lr=0.5, momentum=0.5), "natural", {"steps": 10}),
        (lambda p: SGD(p, lr=0.5, momentum=0.5, nesterov=True, weight_decay=1e-4, fused=True), "natural", {}),
        (lambda p: SGD(p, lr=0.1), "natural", {"steps": 10}),
        # The KL clip sets the length of these steps.
        (lambda p: SGD(p, lr=3.0), "natural", {}),
        (lambda p: SGD(p, lr=0.5, momentum=0.5), "natural", {"damping": 0.1}),
        # The bound is the user's own.
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "natural", {"kl_clip": 0.03}),
        (lambda p: SGD(p, lr=0.5, momentum=0.5), "adam", {}),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3), "adam", {}),
        # A strong decay may be meant in a short run.
        (lambda p: SGD(p, lr=0.5, momentum=0.5, weight_decay=0.01), "natural", {"steps": 60}),
        (lambda p: SGD(p, lr=1.0), "adam", {"steps": 10}),
        # Of others there are no measurements.
        (lambda p: torch.optim.ASGD(p, lr=0.01), "natural", {}),
        (lambda p: Adam(p), "natural", {"groups": []}),
    ],
)
def test_a_good_recipe_is_silent(make: Make, rule: str, options: Any) -> None:
    assert said(make, rule=rule, **options) == ""


@pytest.mark.parametrize("rule", ["natural", "adam"])
@pytest.mark.parametrize(("lr", "momentum", "instead"), [(0.5, 0.5, 1e-5), (0.1, 0.5, 5e-5), (0.5, 0.0, 2e-5)])
def test_a_decay_kept_from_adamw_is_named_with_the_one_that_shrinks_weights_as_adamw_does(
    lr: float, momentum: float, instead: float, rule: str
) -> None:
    parameters = list(nn.Linear(2, 2).double().parameters())
    groups = [{"params": parameters[:1], "weight_decay": 0.05}, {"params": parameters[1:], "weight_decay": 0.0}]
    found = said(lambda p: SGD(groups, lr=lr, momentum=momentum), rule=rule, steps=1000)
    assert found.startswith(f"a weight_decay of 0.05 shrinks the weights by {0.05 * lr / (1 - momentum):.2g} ")
    assert f"Use weight_decay={instead:.3g} to" in found
    decayed, adamw = (
        shrinkage(kind(parameters, **options))
        for kind, options in (
            (SGD, {"lr": lr, "momentum": momentum, "weight_decay": instead}),
            (AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
        )
    )
    # Momentum takes some steps to build up.
    assert decayed == pytest.approx(adamw, rel=0.05)


def test_a_decay_at_a_rate_that_warms_up_is_judged_at_its_peak() -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.5, momentum=0.5, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, 0.5, 1000, cycle_momentum=False)
    found = text(warnings_for(optimizer, Settings(), schedules=[Schedule(schedule)], steps=1000))
    assert "by 0.01 of their size in each step, 1000 times as much as AdamW(lr=0.001, weight_decay=0.01)" in found


def shrinkage(optimizer: Optimizer) -> list[float]:
    """The share by which many steps without a gradient shrink the weight of each group, measured."""
    steps, start = 40, [group["params"][0].detach().clone() for group in optimizer.param_groups]
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    after = [group["params"][0] for group in optimizer.param_groups]
    return [float(1 - (a.detach() / b).mean() ** (1 / steps)) for a, b in zip(after, start, strict=True)]


@pytest.mark.parametrize("decays", [(0.01,), (0.1, 0.0), (0.0,)])
def test_the_replacement_of_adamw_is_a_line_of_code_that_shrinks_weights_as_adamw_does(
    decays: tuple[float, ...],
) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2).double() for _ in decays)

        def groups(self) -> list[dict[str, Any]]:
            return [{"params": list(layer.parameters())} for layer in self.layers]

    module = Module()
    adamw = AdamW(
        [{**g, "weight_decay": d} for g, d in zip(module.groups(), decays, strict=True)], lr=1e-3, weight_decay=7.0
    )
    line = replacement(adamw)
    for group in module.groups():
        line = line.replace('"params": ...', f'"params": {id(group)}, ', 1)
    for i in range(len(decays)):
        line = re.sub(r'"params": \d{6,}, ', f'"params": groups[{i}]["params"]', line, count=1)
    made = eval(line, {"torch": torch, "self": module, "groups": module.groups()})
    assert type(made) is SGD
    assert (made.defaults["lr"], made.defaults["momentum"]) == (0.5, 0.5)
    expected = shrinkage(adamw)
    # Momentum takes some steps to build up.
    assert shrinkage(made) == pytest.approx(expected, rel=0.05, abs=1e-12)
    assert expected == pytest.approx([1e-3 * decay for decay in decays], rel=1e-6, abs=1e-12)


def test_decay_of_a_rate_that_warms_up_is_that_of_its_peak() -> None:
    optimizer = AdamW(nn.Linear(2, 2).parameters(), lr=1e-3, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, 1e-3, 100)
    assert optimizer.param_groups[0]["lr"] < 1e-4
    found = text(warnings_for(optimizer, Settings(), schedules=[Schedule(schedule)], steps=100))
    assert "weight_decay=1e-05" in found
    assert "Set max_lr=0.5 and cycle_momentum=False in OneCycleLR." in found


@pytest.mark.parametrize("rule", ["natural", "adam"])
@pytest.mark.parametrize(
    ("schedule", "name", "low", "high"),
    [
        (lambda o: OneCycleLR(o, 0.5, 100), "OneCycleLR", "0.85", "0.95"),
        (lambda o: CyclicLR(o, 0.1, 0.5, 50), "CyclicLR", "0.8", "0.9"),
        (lambda o: SequentialLR(o, [OneCycleLR(o, 0.5, 98), StepLR(o, 9)], [98]), "OneCycleLR", "0.85", "0.95"),
    ],
)
def test_a_momentum_that_is_cycled_is_named_with_the_option_that_keeps_it(
    schedule: Callable[..., LRScheduler], name: str, low: str, high: str, rule: str
) -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.5, momentum=0.5)
    (found,) = warnings_for(
        optimizer, Settings(rule=rule, damping="auto"), schedules=[Schedule(schedule(optimizer))], steps=100
    )
    assert f"{name} cycles the momentum between {low}" in found.text
    assert f" and {high}. " in found.text
    assert f"`{name}(..., cycle_momentum=False)` to keep the momentum at 0.5" in found.text
    assert found.severe == (rule == "natural")


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: OneCycleLR(o, max_lr=0.5, total_steps=100, div_factor=100, cycle_momentum=False),
        lambda o: OneCycleLR(o, 0.5, 100, base_momentum=0.4, max_momentum=0.5),
        lambda o: CosineAnnealingLR(o, 100),
        lambda o: LinearLR(o, start_factor=0.001),
        lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 90)),
        lambda o: SequentialLR(o, [LinearLR(o, start_factor=0.001), CosineAnnealingLR(o, 95)], [5]),
        lambda o: CyclicLR(o, base_lr=0.001, max_lr=0.5, step_size_up=50, cycle_momentum=False),
        lambda o: MultiStepLR(o, [50, 75]),
        lambda o: ReduceLROnPlateau(o),
        # What its own code does is not looked at.
        lambda o: LambdaLR(o, random_multiplier),
    ],
)
def test_the_usual_schedules_are_silent(schedule: Callable[..., LRScheduler]) -> None:
    optimizer = SGD(list(nn.Linear(2, 2).parameters()), lr=0.5, momentum=0.5)
    assert warnings_for(optimizer, Settings(), schedules=[Schedule(schedule(optimizer))], steps=100) == []


def random_multiplier(step: int) -> float:
    return float(torch.rand(()))


def test_a_schedule_that_never_comes_near_is_reported() -> None:
    optimizer = SGD(list(nn.Linear(2, 2).parameters()), lr=0.5, momentum=0.5)
    schedule = OneCycleLR(optimizer, max_lr=0.001, total_steps=100, cycle_momentum=False)
    found = text(warnings_for(optimizer, Settings(), schedules=[Schedule(schedule)], steps=100))
    assert "the highest learning rate (0.001)" in found


def test_a_schedule_that_goes_on_by_epochs_is_judged_by_the_steps_that_it_makes() -> None:
    optimizer = SGD(list(nn.Linear(2, 2).parameters()), lr=0.5, momentum=0.5)
    schedule = SequentialLR(optimizer, [LinearLR(optimizer, 1e-4, total_iters=90), StepLR(optimizer, 9)], [100])
    assert warnings_for(optimizer, Settings(), schedules=[Schedule(schedule)], steps=100) == []
    found = text(warnings_for(optimizer, Settings(), schedules=[Schedule(schedule, 100)], steps=100))
    assert "the highest learning rate (5e-05)" in found


@pytest.mark.parametrize(("every", "expected"), [(1, "after 44 of 200 steps"), (10, "")])
def test_a_rate_that_vanishes_early_is_named_with_where_it_does(every: int, expected: str) -> None:
    optimizer = SGD(list(nn.Linear(2, 2).parameters()), lr=0.5, momentum=0.5)
    schedules = [Schedule(ExponentialLR(optimizer, 0.9), every)]
    found = text(warnings_for(optimizer, Settings(), schedules=schedules, steps=200))
    assert bool(found) == bool(expected)
    if expected:
        assert f"falls from 0.5 to less than 0.005 {expected}" in found
        assert '`CosineAnnealingLR(optimizer, 200)` with `"interval": "step"`' in found
    # Where it is not known how long the run is, its end is not judged.
    assert warnings_for(optimizer, Settings(), schedules=schedules, steps=math.inf) == []


def lines(caplog: pytest.LogCaptureFixture, make: Make, **options: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(Classifier(optimizer=lambda p: make(list(p))), kfc=KFCCallback(**options), max_steps=2)
    return [line for line in caplog.messages if line.startswith("KFCCallback:")]


def test_the_callback_logs_it_once_when_training_starts(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines(caplog, lambda p: Adam(p))
    assert "preconditioned twice" in line
    assert lines(caplog, lambda p: SGD(p, lr=0.5, momentum=0.5)) == []
    assert lines(caplog, lambda p: SGD(p, lr=0.5, momentum=0.5), rule="adam") == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")
def test_the_low_rate_of_a_resumed_run_that_has_fallen_is_no_reason_for_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Annealed(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.5, momentum=0.5)
            return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, 0.01)}

    path = tmp_path / "annealed.ckpt"
    fit(Annealed(), kfc=KFCCallback(), max_steps=9).save_checkpoint(path)
    resumed = trainer([KFCCallback()], max_steps=15)
    caplog.clear()
    with caplog.at_level("INFO"):
        resumed.fit(Annealed(), loader(), ckpt_path=path)
    assert resumed.optimizers[0].param_groups[0]["lr"] < 1e-4
    assert [line for line in caplog.messages if line.startswith("KFCCallback:")] == []


def test_groups_without_preconditioned_parameters_are_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        # The convolution is left out, and its rate is its own.
        return SGD([{"params": parameters[:2], "lr": 1e-5}, {"params": parameters[2:], "lr": 0.5}], momentum=0.5)

    assert lines(caplog, make, exclude="net.0") == []
    assert lines(caplog, lambda p: SGD(p, lr=1e-5), exclude="net.0")


@pytest.mark.parametrize(("rule", "severe"), [("natural", True), ("adam", False)])
def test_only_a_momentum_that_is_cycled_is_warned_of(rule: str, severe: bool) -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.5, momentum=0.5)
    schedules = [Schedule(OneCycleLR(optimizer, 0.5, 100))]
    (found,) = warnings_for(
        optimizer, Settings(rule=rule, damping="auto", kl_clip="auto"), schedules=schedules, steps=100
    )
    assert found.severe == severe


def test_the_callback_warns_where_training_would_be_clearly_worse() -> None:
    module = Classifier(optimizer=lambda p: SGD(p, lr=0.5, momentum=0.5))
    made = module.configure_optimizers

    def with_schedule() -> dict[str, Any]:
        optimizer: Any = made()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": OneCycleLR(optimizer, 0.5, 100), "interval": "step"},
        }

    module.configure_optimizers = with_schedule
    with pytest.warns(UserWarning, match="OneCycleLR cycles the momentum between .* and 0.95. KFC limits it."):
        fit(module, kfc=KFCCallback(), max_steps=2)


def test_the_page_has_the_messages_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs")
    import generate_recipes_table as generator

    assert generator.PAGE.read_text("utf-8") == generator.page(), "run: python docs/generate_recipes_table.py"
