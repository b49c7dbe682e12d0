"""Warnings about optimizers, and about their schedules, that work poorly together with KFC.

Each was measured on small trainings, beside what it recommends: ``python -m benchmarks.accuracy.recipes``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_kfc.callback.schedule_preview import Planned, Schedule, preview
from lightning_kfc.monitoring.advice import LONG_MOMENTUM
from lightning_kfc.rules.momentum import is_sgd
from lightning_kfc.settings import Settings

#: What to put into ``configure_optimizers``, beside either rule.
RATE, MOMENTUM = 0.5, 0.5
RECOMMENDED = f"SGD(lr={RATE:g}, momentum={MOMENTUM:g})"
#: By rule: training is slower where no rate comes up to this.
LOW_RATE = {"natural": 0.002, "adam": 0.05}
#: And above this. The KL clip bounds the steps of the natural gradient, whatever the rate.
HIGH_RATE = {"natural": math.inf, "adam": 1.0}
#: Optimizers that scale each coordinate by its own recent gradients, by the names of their classes.
RESCALING = frozenset(
    ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam")
)
#: A momentum of :data:`LONG_MOMENTUM` reaches so far back that a run of fewer steps is clearly worse by it.
SHORT_RUN = 500
#: A rate below this share of its own peak moves nothing any more; a run should not spend half of its steps there.
VANISHED, VANISHED_FOR = 0.01, 0.5


@dataclass(frozen=True)
class OptimizerWarning:
    """A sentence or two on an optimizer.

    Attributes:
        text: What works against the method, and what to put in its place.
        severe: Whether training would be clearly worse, so that it deserves a warning.
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
) -> list[OptimizerWarning]:
    """The parts of an optimizer and its schedules that work against KFC; none for the recommended one and its like.

    Args:
        optimizer: The optimizer.
        settings: Those of the preconditioner beside it.
        groups: The parameter groups that have preconditioned parameters; None for all.
        schedules: The learning-rate schedulers of this optimizer.
        steps: How many optimizer steps are to come, as far as is known.
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
        found += _of_momentum(optimizer, planned, schedules, settings.rule, steps)
        # A momentum that is too high is named once.
        found += [] if found else map(OptimizerWarning, _of_rates(planned, settings.rule, steps))
    if settings.rule == "adam" and settings.damping != "auto":
        found.append(OptimizerWarning("damping has no part in rule='adam'; leave it out."))
    return found


def warning_for_run(settings: Settings, steps: float) -> OptimizerWarning | None:
    """A sentence on a run that is over soon after its warm-up; None for others.

    Args:
        settings: Those of the preconditioner.
        steps: How many optimizer steps the run has, as far as is known.
    """
    if not settings.warmup_steps < steps < settings.warmup_steps + settings.schedule.inverse_every_n_steps:
        return None
    return OptimizerWarning(
        f"the run of {steps:.0f} steps ends within the first period of inverses after the warm-up: use "
        f"`KFCCallback(warmup_steps={steps:.0f})`, so that curvature follows every step."
    )


def rescales(optimizer: Optimizer) -> bool:
    """Whether an optimizer scales each coordinate by its own recent gradients, as Adam does."""
    # Adam's own setting marks the optimizers of other packages.
    return "betas" in optimizer.defaults or any(cls.__name__ in RESCALING for cls in type(optimizer).__mro__)


def _of_rescaling(optimizer: Optimizer, rule: str, schedules: Sequence[Schedule]) -> str:
    name = type(optimizer).__name__
    if rule == "adam":
        reason = f"rule='adam' makes Adam's step itself, and {name} takes it for a gradient and rescales it once more"
    else:
        reason = (
            f"{name} rescales each coordinate of the preconditioned gradient by its own recent size, so that gradients "
            "are preconditioned twice"
        )
    decay = ""
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        decay = " It shrinks the weights as before."
    peaks = [type(each).__name__ for each in _flat(s.scheduler for s in schedules) if hasattr(each, "cycle_momentum")]
    schedule = f" The max_lr of {peaks[0]} becomes {RATE:g}, with cycle_momentum=False." if peaks else ""
    return f"{reason}. Replace it by `{replacement(optimizer)}`.{decay}{schedule}"


def replacement(optimizer: Optimizer) -> str:
    """The line of code that makes the recommended optimizer with the weight decay of another one.

    A step of AdamW shrinks weights by the share ``lr * weight_decay``, one of SGD by
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
    optimizer: Optimizer, planned: Planned, schedules: Sequence[Schedule], rule: str, steps: float
) -> Iterator[OptimizerWarning]:
    highest = max(planned.momenta)
    own = float(optimizer.defaults.get("momentum") or 0)
    schedulers = _flat(schedule.scheduler for schedule in schedules)
    cycling = [type(each).__name__ for each in schedulers if getattr(each, "cycle_momentum", False)]
    if cycling and highest > own:
        name, low = cycling[0], min(planned.momenta)
        yield OptimizerWarning(
            f"{name} cycles the momentum between {low:g} and {highest:g}, and makes steps up to {_longer(highest):.0f} "
            f"times as long as the KL bound allows. Use `{name}(..., cycle_momentum=False)`: the momentum stays at "
            f"{own:g}.",
            severe=rule == "natural",
        )
    # The rule "adam" takes the optimizer's momentum out: it has its own.
    elif rule == "natural" and highest >= LONG_MOMENTUM and steps < SHORT_RUN:
        yield OptimizerWarning(
            f"a momentum of {highest:g} averages over {_longer(highest):.0f} steps, much of a run of {steps:.0f}, and "
            f"makes steps as many times as long as the KL bound allows. Use {RECOMMENDED}.",
            severe=True,
        )


def _of_rates(planned: Planned, rule: str, steps: float) -> Iterator[str]:
    peak = max(planned.rates)
    # The rule "adam" goes by what the momentum makes of it: compared is the rate that is as long with the usual 0.5.
    momentum = planned.momenta[planned.rates.index(peak)] if rule == "adam" else MOMENTUM
    compared = peak * MOMENTUM / max(1 - momentum, 1e-3)
    beside = f", with a momentum of {momentum:g}," if rule == "adam" and momentum > MOMENTUM else ""
    if not LOW_RATE[rule] <= compared <= HIGH_RATE[rule]:
        yield (
            f"the learning rate, {peak:.2g} at its highest,{beside} is far from that of KFC, whose steps have other "
            f"units than those of plain SGD. Use {RECOMMENDED}, and scale its schedule with it."
        )
    elif planned.whole:
        moving = max(i for i, rate in enumerate(planned.rates, 1) if rate >= VANISHED * peak)
        if len(planned.rates) - moving > VANISHED_FOR * len(planned.rates):
            yield (
                f"the learning rate falls from {peak:.2g} to less than {VANISHED * peak:.1g} after {moving} of "
                f"{steps:.0f} steps, and the rest of the run hardly moves. Use "
                f'`CosineAnnealingLR(optimizer, {steps:.0f})` with `"interval": "step"`.'
            )


def _longer(momentum: float) -> float:
    """The factor by which momentum lengthens steps that keep their direction."""
    return 1 / max(1 - momentum, 1e-3)


def _peak(group: Mapping[str, Any]) -> float:
    """The highest learning rate that a group is known to reach: a schedule that warms up starts far below it."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def _as_known(groups: Sequence[Mapping[str, Any]]) -> Planned:
    """The numbers of groups whose schedules cannot be looked at ahead of time."""
    momentum = max(float(group.get("momentum") or 0) for group in groups)
    return Planned([max(map(_peak, groups))], [momentum], False)


def _flat(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers with those that they hold."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))
