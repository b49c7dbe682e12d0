"""What to say, when training starts, of an optimizer that suits the rule beside it badly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_kfc.rules.momentum import is_sgd
from lightning_kfc.settings import Settings

#: What to put into ``configure_optimizers``, beside either rule.
RECOMMENDED = "SGD(lr=0.5, momentum=0.5)"
#: Learning rates further from the recommended one than these are far.
USUAL_RATES = (0.05, 1.0)
#: Optimizers that scale each coordinate by its own recent gradients, by the names of their classes.
RESCALING = frozenset(
    ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam")
)
#: A momentum of this much reaches so far back that a run of fewer steps gains nothing by it.
LONG_MOMENTUM, SHORT_RUN = 0.9, 300
#: With such a momentum, and a learning rate that it multiplies to more than this, training went clearly worse.
LONGEST_STEPS = 2.0


@dataclass(frozen=True)
class Advice:
    """What to say.

    Attributes:
        text: One or two sentences.
        severe: Whether training would be clearly worse, so that it deserves a warning.
    """

    text: str
    severe: bool = False


def advice(
    optimizer: Optimizer,
    settings: Settings,
    *,
    groups: Sequence[Mapping[str, Any]] | None = None,
    schedulers: Iterable[Any] = (),
    steps: float = math.inf,
) -> list[Advice]:
    """What to say of an optimizer that is not the recommended one; nothing where it comes near to it.

    Args:
        optimizer: The optimizer.
        settings: Those of the preconditioner beside it.
        groups: The parameter groups that have preconditioned parameters; None for all.
        schedulers: The learning-rate schedulers of this optimizer.
        steps: How many optimizer steps the run has, as far as is known.
    """
    groups = optimizer.param_groups if groups is None else groups
    if not groups:
        return []
    name = type(optimizer).__name__
    found: list[Advice] = []
    if rescales(optimizer):
        found += map(Advice, _of_rescaling(name, groups, settings.rule))
    elif is_sgd(optimizer):
        rate = highest_rate(groups, schedulers)
        momentum = max(float(group.get("momentum") or 0) for group in groups)
        found += _of_momentum(momentum, rate, settings.rule, steps)
        found += map(Advice, _of_rate(momentum, rate, settings.rule))
    if settings.rule == "adam" and settings.damping != "auto":
        found.append(Advice("damping has no part in rule='adam'; leave it out."))
    return found


def rescales(optimizer: Optimizer) -> bool:
    """Whether an optimizer scales each coordinate by its own recent gradients, as Adam does."""
    # Optimizers of other packages are told by Adam's own setting.
    return "betas" in optimizer.defaults or any(cls.__name__ in RESCALING for cls in type(optimizer).__mro__)


def _of_rescaling(name: str, groups: Sequence[Mapping[str, Any]], rule: str) -> Iterator[str]:
    if rule == "adam":
        yield (
            f"rule='adam' makes Adam's step itself, and {name} takes it for a gradient and rescales it once more. "
            f"Use {RECOMMENDED}."
        )
    else:
        yield (
            f"{name} rescales each coordinate of the preconditioned gradient by its own recent size, so that gradients "
            f"are preconditioned twice. Use {RECOMMENDED}; with it, too, rule='adam' is Adam in the basis of the "
            "curvature."
        )
    decays = any(group.get("weight_decay") and not group.get("decoupled_weight_decay") for group in groups)
    if decays and name not in ("AdamW", "SparseAdam"):
        yield (
            f"{name} adds its weight decay to the preconditioned gradient and rescales the sum: how strongly a weight "
            "decays then depends on the size of its update. SGD's, and AdamW's, does not."
        )


def _of_momentum(momentum: float, rate: float, rule: str, steps: float) -> Iterator[Advice]:
    longer = 1 / max(1 - momentum, 1e-3)
    # The rule "adam" takes the optimizer's momentum out: it has its own.
    if rule == "natural" and momentum >= LONG_MOMENTUM and steps < SHORT_RUN:
        text = (
            f"a momentum of {momentum:g} averages over {longer:.0f} steps, much of a run of {steps:.0f}, and makes "
            "steps as many times as long as the KL bound knows. Natural-gradient steps need less: use "
            f"{RECOMMENDED}."
        )
        yield Advice(text, severe=rate * longer > LONGEST_STEPS)


def _of_rate(momentum: float, rate: float, rule: str) -> Iterator[str]:
    low, high = USUAL_RATES
    # The rule "adam" goes by what the momentum makes of it: compared is the rate that is as long with the usual 0.5.
    compared = 0.5 * rate / max(1 - momentum, 1e-3) if rule == "adam" else rate
    if not low <= compared <= high:
        beside = f", with a momentum of {momentum:g}," if rule == "adam" and momentum else ""
        yield (
            f"the learning rate of {rate:g}{beside} is far from what KFC takes, whose steps have other units than "
            f"those of plain SGD. Start from {RECOMMENDED}."
        )


def highest_rate(groups: Sequence[Mapping[str, Any]], schedulers: Iterable[Any] = ()) -> float:
    """The highest learning rate that groups are known to reach: a schedule that warms up starts far below it."""
    rates = [float(group[key]) for group in groups for key in ("lr", "initial_lr", "max_lr") if key in group]
    for scheduler in schedulers:
        rates += map(float, getattr(scheduler, "max_lrs", ()))
    return max(rates)
