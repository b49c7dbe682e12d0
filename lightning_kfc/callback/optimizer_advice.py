"""Warnings about optimizers and schedules that work poorly together with KFC.

``python -m benchmarks.accuracy.recipes`` measures each one and its replacement on small trainings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_kfc.callback.schedule_preview import Planned, Schedule, preview
from lightning_kfc.rules.choice import momentum_limit
from lightning_kfc.rules.momentum import is_sgd, lengthening
from lightning_kfc.rules.natural import HIGHEST_MOMENTUM
from lightning_kfc.settings import Settings
from lightning_kfc.utilities.torch_internals import inner_schedulers

#: The optimizer to return from ``configure_optimizers``, with either rule.
RATE, MOMENTUM = 0.5, HIGHEST_MOMENTUM
RECOMMENDED = f"SGD(lr={RATE:g}, momentum={MOMENTUM:g})"
#: By rule: training is slower with lower learning rates.
LOW_RATE = {"natural": 0.002, "adam": 0.05}
#: By rule: training is slower with higher ones. The KL clip bounds steps of the rule "natural" at any rate.
HIGH_RATE = {"natural": math.inf, "adam": 1.0}
#: Optimizers that scale each coordinate by its own recent gradients, by the names of their classes.
RESCALING = frozenset(
    ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam")
)
#: A rate below the first share of its peak hardly moves the weights; warn above the second share of such steps.
VANISHED, VANISHED_FOR = 0.01, 0.5
#: The usual rate and weight decay of AdamW, and the highest share by which a decay may shrink weights in a step.
ADAMW_RATE, ADAMW_DECAY, MOST_SHRUNK = 1e-3, 0.01, 1e-3


@dataclass(frozen=True)
class OptimizerWarning:
    """A warning about an optimizer.

    Attributes:
        text: The problem, and the replacement.
        severe: Whether training would be clearly worse; then it is a warning, else information.
    """

    text: str
    severe: bool = False


def warnings_for(
    optimizer: Optimizer,
    settings: Settings,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
    schedules: Iterable[Schedule] = (),
    steps: float = math.inf,
    resumed: bool = False,
) -> list[OptimizerWarning]:
    """Warnings about an optimizer and its schedules; none for the recommended optimizer.

    Args:
        optimizer: The optimizer.
        settings: The engine's settings.
        groups: The parameter groups that have preconditioned parameters; None for all.
        schedules: The learning-rate schedulers of this optimizer.
        steps: The remaining optimizer steps; infinity if unknown.
        resumed: Whether steps were made before, since which the learning rate may have fallen.
    """
    groups = optimizer.param_groups if groups is None else groups
    if not groups:
        return []
    schedules = list(schedules)
    found: list[OptimizerWarning] = []
    if rescales(optimizer):
        found.append(OptimizerWarning(_of_rescaling(optimizer, settings.rule, schedules)))
    elif is_sgd(optimizer):
        planned = preview(optimizer, groups, schedules, steps) or _as_known(groups)
        # One sentence is enough: each replaces what the next ones are about.
        found += _of_momentum(optimizer, planned, schedules, settings)
        found += [] if found or resumed else map(OptimizerWarning, _of_rates(planned, settings, steps))
        found += [] if found else map(OptimizerWarning, _of_the_limit(planned, settings))
        found += map(OptimizerWarning, _of_decay(groups, steps))
    if settings.rule == "adam" and settings.damping != "auto":
        found.append(OptimizerWarning("rule='adam' does not use `damping`; leave it out."))
    return found


def warning_for_run(settings: Settings, steps: float) -> OptimizerWarning | None:
    """A warning about a run that ends soon after its warm-up; None for others.

    Args:
        settings: The engine's settings.
        steps: The optimizer steps of the run; infinity if unknown.
    """
    if not settings.warmup_steps < steps < settings.warmup_steps + settings.schedule.inverse_every_n_steps:
        return None
    return OptimizerWarning(
        f"the run of {steps:.0f} steps ends before the first refresh of inverses after the warm-up. Use "
        f"`KFCCallback(warmup_steps={steps:.0f})` to refresh them throughout the run."
    )


def rescales(optimizer: Optimizer) -> bool:
    """Whether an optimizer scales each coordinate by its own recent gradients, as Adam does."""
    # Adam's own setting marks the optimizers of other packages.
    return "betas" in optimizer.defaults or any(cls.__name__ in RESCALING for cls in type(optimizer).__mro__)


def _of_rescaling(optimizer: Optimizer, rule: str, schedules: Sequence[Schedule]) -> str:
    name = type(optimizer).__name__
    if rule == "adam":
        reason = f"rule='adam' computes Adam's step, and {name} rescales that step once more"
    else:
        reason = (
            f"{name} rescales each coordinate of the preconditioned gradient by its recent size, so that gradients "
            "are preconditioned twice"
        )
    decay = ""
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        decay = " The weight decay per step stays the same."
    peaks = [type(each).__name__ for each in _flat(s.scheduler for s in schedules) if hasattr(each, "cycle_momentum")]
    schedule = f" Set max_lr={RATE:g} and cycle_momentum=False in {peaks[0]}." if peaks else ""
    return f"{reason}. Replace it by `{replacement(optimizer)}`.{decay}{schedule}"


def replacement(optimizer: Optimizer) -> str:
    """The code of the recommended optimizer with the weight decay of another one.

    A step of AdamW shrinks weights by the share ``lr * weight_decay``; a step of SGD by
    ``lr * weight_decay / (1 - momentum)``.
    """
    shares = [_peak(group) * float(group.get("weight_decay") or 0) for group in optimizer.param_groups]
    decays = [f"{share * (1 - MOMENTUM) / RATE:.3g}" for share in shares]
    options = f"lr={RATE:g}, momentum={MOMENTUM:g}"
    if len(set(decays)) > 1:
        groups = ", ".join(f'{{"params": ..., "weight_decay": {decay}}}' for decay in decays)
        return f"torch.optim.SGD([{groups}], {options})"
    return f"torch.optim.SGD(self.parameters(), {options}{'' if decays[0] == '0' else f', weight_decay={decays[0]}'})"


def _of_momentum(
    optimizer: Optimizer, planned: Planned, schedules: Sequence[Schedule], settings: Settings
) -> Iterator[OptimizerWarning]:
    highest = max(planned.momenta)
    own = float(optimizer.defaults.get("momentum") or 0)
    schedulers = _flat(schedule.scheduler for schedule in schedules)
    cycling = [type(each).__name__ for each in schedulers if getattr(each, "cycle_momentum", False)]
    if cycling and highest > own:
        name, low = cycling[0], min(planned.momenta)
        then = f"Steps become up to {_longer(highest):.0f} times as long as without momentum."
        if settings.rule == "adam":
            then = "KFC removes it."
        elif momentum_limit(settings) is not None:
            then = "KFC limits it."
        yield OptimizerWarning(
            f"{name} cycles the momentum between {low:g} and {highest:g}. {then} Use "
            f"`{name}(..., cycle_momentum=False)` to keep the momentum at {own:g}.",
            severe=settings.rule == "natural",
        )


def _of_the_limit(planned: Planned, settings: Settings) -> Iterator[str]:
    highest, limit = max(planned.momenta), momentum_limit(settings)
    if limit is not None and limit < highest < 1:
        rate = max(planned.rates) * lengthening(highest, limit)
        yield (
            f"KFC limits the momentum of {highest:g} to {limit:g}, and makes steps longer in return: they are those of "
            f"SGD(lr={rate:.2g}, momentum={limit:g}), which moves the weights as far under a constant gradient."
        )


def _of_rates(planned: Planned, settings: Settings, steps: float) -> Iterator[str]:
    rule, peak = settings.rule, max(planned.rates)
    # Momentum that is removed becomes a longer rate: compare the one that gives the same step with the recommended one.
    momentum = planned.momenta[planned.rates.index(peak)]
    if rule == "natural":
        momentum = MOMENTUM if momentum_limit(settings) is None else max(momentum, MOMENTUM)
    compared = peak * MOMENTUM / max(1 - momentum, 1e-3)
    beside = f" with a momentum of {momentum:g}" if momentum > MOMENTUM else ""
    if not LOW_RATE[rule] <= compared <= HIGH_RATE[rule]:
        yield (
            f"the highest learning rate ({peak:.2g}{beside}) is far from the rates that suit KFC: preconditioned "
            f"gradients have other units than plain ones. Use {RECOMMENDED}, and scale its schedule with it."
        )
    elif planned.whole:
        moving = max(i for i, rate in enumerate(planned.rates, 1) if rate >= VANISHED * peak)
        if len(planned.rates) - moving > VANISHED_FOR * len(planned.rates):
            yield (
                f"the learning rate falls from {peak:.2g} to less than {VANISHED * peak:.1g} after {moving} of "
                f"{steps:.0f} steps, and the weights hardly move afterwards. Use "
                f'`CosineAnnealingLR(optimizer, {steps:.0f})` with `"interval": "step"`.'
            )


def _of_decay(groups: Sequence[Mapping[str, Any]], steps: float) -> Iterator[str]:
    group = max(groups, key=_shrinkage)
    share = _shrinkage(group)
    # In a run shorter than the time in which the decay removes a weight, a strong decay may be meant.
    if share > MOST_SHRUNK * (1 + 1e-6) and share * steps > 1 + 1e-6:
        decay, usual = float(group["weight_decay"]), ADAMW_RATE * ADAMW_DECAY
        yield (
            f"a weight_decay of {decay:g} shrinks the weights by {share:.2g} of their size in each step, "
            f"{share / usual:.0f} times as much as AdamW(lr={ADAMW_RATE:g}, weight_decay={ADAMW_DECAY:g}). Use "
            f"weight_decay={decay * usual / share:.3g} to shrink them as AdamW does."
        )


def _shrinkage(group: Mapping[str, Any]) -> float:
    """The share by which a step of SGD shrinks the weights of a group at its peak rate."""
    return _peak(group) * float(group.get("weight_decay") or 0) * _longer(float(group.get("momentum") or 0))


def _longer(momentum: float) -> float:
    """The factor by which momentum lengthens steps that keep their direction."""
    return 1 / max(1 - momentum, 1e-3)


def _peak(group: Mapping[str, Any]) -> float:
    """The highest known learning rate of a group: a schedule with a warm-up starts far below it."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def _as_known(groups: Sequence[Mapping[str, Any]]) -> Planned:
    """The present rates and momenta, for groups whose schedules cannot be previewed."""
    momentum = max(float(group.get("momentum") or 0) for group in groups)
    return Planned([max(map(_peak, groups))], [momentum], False)


def _flat(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, each followed by its inner ones."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(inner_schedulers(scheduler))
