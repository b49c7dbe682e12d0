"""Advice in words, from the numbers of a training: each rule is a function of :class:`Facts` alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

#: The KL clip sets the step, not the learning rate, where so large a share of so many steps is cut to less than this.
CUT_TO, CUT_SHARE, CUT_STEPS = 0.1, 0.95, 100
#: Clipping of gradients sets the step where it leaves less than this of half of so many updates.
CLIPPED_TO, CLIPPED_STEPS = 0.1, 50
#: Beside a momentum of this much clipping shortens steps that would be too long: it was seen to rescue such trainings.
LONG_MOMENTUM = 0.9
#: What takes more of a step's time than the first share is worth a period that gives it the second.
TIME_SHARE, WANTED_SHARE = 0.25, 0.1
#: Shares of time say little before so many steps after the warm-up have been timed.
TIMED_STEPS = 50
#: Skipped, or undone, steps are many where there are so many, and they are this share; of undone ones, which are taken
#: back to the best point on their way and are not lost, more do no harm.
MANY, MANY_SHARE, MANY_UNDONE_SHARE = 5, 0.05, 0.1
#: A gradient scaler finds its scale by a few skipped steps at the start.
MANY_SCALED = 10
#: Coverage of a smaller share of the trainable parameters is small.
COVERED_SHARE = 0.5


@dataclass(frozen=True)
class Facts:
    """What is known of a training when advice is asked for.

    Attributes:
        steps: Preconditioned steps of this fit.
        clip_factors: Of the last :data:`CUT_STEPS` steps, the factor of the KL clip.
        kl_clip: The bound in force; None for none.
        automatic_kl_clip: Whether it sets itself.
        damping: In force.
        automatic_damping: Whether the damping is ``"auto"``, of which there is nothing to advise.
        damped: Whether the damping has a part in the updates; the rule "adam" does without.
        below_damping: Layers whose largest curvature was below the damping whenever it was looked at lately.
        layers: The number of layers that were looked at.
        timed_steps: Steps after the warm-up that were timed.
        time_shares: The share of these steps' time by part, of :data:`lightning_kfc.monitoring.timing.PARTS`.
        factor_every_n_steps: The period of statistics.
        inverse_every_n_steps: The period of inverses.
        undone_steps: Steps that were taken back.
        covered_parameters: Trainable parameters with Kronecker factors or blocks, so with more than a diagonal.
        trainable_parameters: All that are trainable.
        chosen_layers: Whether `include` or `exclude` say which layers are preconditioned.
        nonfinite_steps: Steps that were skipped, their gradients not being finite.
        gradient_scaler: Whether a gradient scaler is at work (float16).
        gradient_clip_factors: Of the last :data:`CLIPPED_STEPS` updates, the part of their length that the clipping of
            gradients has left; empty where there is no clipping.
        momentum: The highest momentum of an optimizer.
    """

    steps: int = 0
    clip_factors: Sequence[float] = ()
    kl_clip: float | None = None
    automatic_kl_clip: bool = False
    damping: float = 0.01
    automatic_damping: bool = False
    damped: bool = True
    below_damping: Sequence[str] = ()
    layers: int = 0
    timed_steps: int = 0
    time_shares: Mapping[str, float] = field(default_factory=dict)
    factor_every_n_steps: int = 10
    inverse_every_n_steps: int = 20
    undone_steps: int = 0
    covered_parameters: int = 1
    trainable_parameters: int = 1
    chosen_layers: bool = False
    nonfinite_steps: int = 0
    gradient_scaler: bool = False
    gradient_clip_factors: Sequence[float] = ()
    momentum: float = 0.0


def clip_sets_the_step(facts: Facts) -> str | None:
    """The KL clip cuts nearly every step to a small part."""
    factors = facts.clip_factors
    cut = sum(factor < CUT_TO for factor in factors)
    if len(factors) < CUT_STEPS or facts.kl_clip is None or cut < CUT_SHARE * len(factors):
        return None
    found = (
        f"the KL clip cut {100 * cut // len(factors)}% of the last {len(factors)} steps to less than {CUT_TO:g} of "
        "their length, so that it sets the step and not the learning rate: lower the learning rate"
    )
    if facts.automatic_kl_clip:
        return f"{found} (kl_clip='auto' has set itself to {facts.kl_clip:.3g}, from what steps did to the loss)."
    return f"{found}, or raise kl_clip={facts.kl_clip:g}."


def gradient_clipping_sets_the_step(facts: Facts) -> str | None:
    """Clipping of gradients, which acts on the preconditioned ones, leaves little of most updates."""
    factors = facts.gradient_clip_factors
    if len(factors) < CLIPPED_STEPS or median(factors) >= CLIPPED_TO or facts.momentum >= LONG_MOMENTUM:
        return None
    bound = "kl_clip bounds every update" if facts.kl_clip is not None else "kl_clip='auto' bounds updates"
    return (
        f"gradient clipping cut half of the last {len(factors)} updates to less than {median(factors):.2g} of their "
        f"length, so that it sets the step: leave gradient_clip_val out, {bound}."
    )


def damping_above_curvature(facts: Facts) -> str | None:
    """Some layers have no direction whose curvature reaches the damping."""
    # An automatic one follows the loss; near the end of a training curvature vanishes below it.
    if not facts.damped or not facts.below_damping or facts.automatic_damping:
        return None
    names = _listed(facts.below_damping)
    return (
        f"damping ({facts.damping:.3g}) is above the largest curvature of {names}, {len(facts.below_damping)} of "
        f"{facts.layers} layers: they get plain SGD, its learning rate divided by the damping. Lower damping, unless "
        "the training is nearly done and its curvature gone."
    )


def inverses_take_long(facts: Facts) -> str | None:
    """Inverses take a large part of a step."""
    return _longer_period(facts, "inverses", "inverse_every_n_steps", facts.inverse_every_n_steps)


def statistics_take_long(facts: Facts) -> str | None:
    """Statistics take a large part of a step."""
    return _longer_period(facts, "statistics", "factor_every_n_steps", facts.factor_every_n_steps)


def _longer_period(facts: Facts, part: str, option: str, period: int) -> str | None:
    share = facts.time_shares.get(part, 0.0)
    if facts.timed_steps < max(TIMED_STEPS, 2 * period) or share <= TIME_SHARE:
        return None
    wanted = longer_period(period, share, WANTED_SHARE)
    if part == "inverses":
        # In between, the factors have not changed.
        wanted = math.ceil(wanted / facts.factor_every_n_steps) * facts.factor_every_n_steps
    return f"{part} take {100 * share:.0f}% of the step: set {option} to {wanted} (it is {period})."


def longer_period(period: int, share: float, wanted: float) -> int:
    """The period at which something that took a share of the time at another one takes the wanted share.

    Args:
        period: The present period, in steps.
        share: Of the time, below 1.
        wanted: The share to come to, below 1.
    """
    # Per unit of what else a step does, share / (1 - share) now; the period divides it. Rounding must not add a step.
    ratio = share / (1 - share) * (1 - wanted) / wanted if share < 1 else 1000.0
    return max(period, math.ceil(period * ratio - 1e-9))


def many_undone_steps(facts: Facts) -> str | None:
    """Reviews take many steps back."""
    undone = facts.undone_steps
    if undone < MANY or undone < MANY_UNDONE_SHARE * facts.steps:
        return None
    return (
        f"{undone} of {facts.steps} steps made the loss of their own batch larger, and were taken back in whole or in "
        "part: lower the learning rate or the momentum of the optimizer."
    )


def small_coverage(facts: Facts) -> str | None:
    """Most parameters have a diagonal curvature or none, and nobody asked for that."""
    share = facts.covered_parameters / max(1, facts.trainable_parameters)
    if facts.chosen_layers or share >= COVERED_SHARE:
        return None
    return (
        f"only {100 * share:.0f}% of the trainable parameters have Kronecker factors; the table at the start says why. "
        "Use layers that are modules, such as nn.Linear, or register an adapter for those that hold the others."
    )


def many_nonfinite_steps(facts: Facts) -> str | None:
    """Many steps are skipped since their gradients are not finite."""
    skipped, attempts = facts.nonfinite_steps, facts.steps + facts.nonfinite_steps
    if skipped < (MANY_SCALED if facts.gradient_scaler else MANY) or skipped < MANY_SHARE * attempts:
        return None
    found = f"{skipped} of {attempts} steps were skipped, their gradients not being finite"
    if facts.gradient_scaler:
        return f"{found}: float16 overflows. Use precision='bf16-mixed', or lower the learning rate."
    return f"{found}: look for a NaN in the data or the loss, or lower the learning rate."


Rule = Callable[[Facts], str | None]

RULES: tuple[Rule, ...] = (
    clip_sets_the_step,
    gradient_clipping_sets_the_step,
    damping_above_curvature,
    inverses_take_long,
    statistics_take_long,
    many_undone_steps,
    small_coverage,
    many_nonfinite_steps,
)


class Adviser:
    """Applies the rules, and gives each one's advice once.

    Args:
        rules: The rules.
    """

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self._silent = list(rules)
        #: The advice that was given, in order.
        self.given: list[str] = []

    def new(self, facts: Facts) -> list[str]:
        """The advice of rules that have given none before."""
        found = {rule: sentence for rule in self._silent if (sentence := rule(facts)) is not None}
        self._silent = [rule for rule in self._silent if rule not in found]
        self.given += found.values()
        return list(found.values())


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
