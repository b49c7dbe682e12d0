"""Advice from the numbers of a training; each rule is a function of :class:`Facts`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from lightning_kfc.monitoring.events import shortened

#: The KL clip sets the step if it shortens the second share of the last steps to less than the first share.
CUT_TO, CUT_SHARE, CUT_STEPS = 0.1, 0.95, 100
#: Gradient clipping sets the step if it shortens half of the last updates to less than this share.
CLIPPED_TO, CLIPPED_STEPS = 0.1, 50
#: With this momentum steps may be too long, and clipping can rescue a training: no advice against it.
LONG_MOMENTUM = 0.9
#: A phase above the first share of a step's time gets advice for a period with the second share.
TIME_SHARE, WANTED_SHARE = 0.25, 0.1
#: Timed steps after the warm-up before advice on time.
TIMED_STEPS = 50
#: The count and the share above which skipped steps are many. The share for undone steps is larger: a step back to the
#: best point on its way is not lost.
MANY, MANY_SHARE, MANY_UNDONE_SHARE = 5, 0.05, 0.1
#: With a gradient scaler, which skips some steps at the start to find its scale.
MANY_SCALED = 10
#: The rows of a step up to which a layer's factors are so singular that training is clearly worse.
FEW_ROWS = 2
#: Steps before the first advice.
FIRST_STEPS = 20
#: The share of trainable parameters below which coverage is small.
COVERED_SHARE = 0.5


@dataclass(frozen=True)
class Facts:
    """The numbers of a training that advice depends on.

    Attributes:
        steps: Preconditioned steps of this fit.
        clip_factors: The factor of the KL clip at each of the last :data:`CUT_STEPS` steps.
        kl_clip: The bound in force; None for none.
        automatic_kl_clip: Whether the bound is ``"auto"``.
        damping: The damping in force.
        automatic_damping: Whether the damping is ``"auto"``.
        damped: Whether the rule uses the damping; the rule "adam" does not.
        below_damping: Layers whose largest curvature was below the damping at each of the last measurements.
        layers: The number of measured layers.
        timed_steps: Timed steps after the warm-up.
        time_shares: The share of these steps' time by phase, of :data:`lightning_kfc.monitoring.timing.PHASES`.
        factor_every_n_steps: The period of statistics.
        inverse_every_n_steps: The period of inverses.
        undone_steps: Steps that were undone.
        covered_parameters: Trainable parameters with Kronecker factors or blocks.
        trainable_parameters: All trainable parameters, without those of layers that wait for statistics.
        plain_parameters: Trainable parameters without any curvature, which the KL clip does not bound.
        chosen_layers: Whether `include` or `exclude` is given.
        nonfinite_steps: Steps that were skipped for gradients that are not finite.
        gradient_scaler: Whether a gradient scaler is active (float16).
        gradient_clip_factors: The share of its length that gradient clipping left of each of the last
            :data:`CLIPPED_STEPS` updates; empty without clipping.
        momentum: The highest momentum of an optimizer.
        fewest_rows: The rows of a step (examples times positions) of the layer with Kronecker factors that has the
            fewest; None if unknown.
        layer_of_fewest_rows: The name of that layer.
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
    plain_parameters: int = 0
    chosen_layers: bool = False
    nonfinite_steps: int = 0
    gradient_scaler: bool = False
    gradient_clip_factors: Sequence[float] = ()
    momentum: float = 0.0
    fewest_rows: int | None = None
    layer_of_fewest_rows: str = ""


def clip_sets_the_step(facts: Facts) -> str | None:
    """The KL clip cuts nearly every step to a small part."""
    factors = facts.clip_factors
    cut = sum(factor < CUT_TO for factor in factors)
    if len(factors) < CUT_STEPS or facts.kl_clip is None or cut < CUT_SHARE * len(factors):
        return None
    found = (
        f"the KL clip shortened {100 * cut // len(factors)}% of the last {len(factors)} steps to less than "
        f"{CUT_TO:g} of their length, so that the learning rate and its schedule have no effect"
    )
    if facts.automatic_kl_clip:
        return f"{found} (kl_clip='auto' is {facts.kl_clip:.3g} now). If a schedule is to act, set kl_clip to a number."
    return f"{found}. Raise kl_clip={facts.kl_clip:g}, or lower the learning rate."


def gradient_clipping_sets_the_step(facts: Facts) -> str | None:
    """Gradient clipping, which acts on preconditioned gradients, shortens most updates to a small part."""
    factors = facts.gradient_clip_factors
    if len(factors) < CLIPPED_STEPS or median(factors) >= CLIPPED_TO or facts.momentum >= LONG_MOMENTUM:
        return None
    bound = "kl_clip bounds every update" if facts.kl_clip is not None else "kl_clip='auto' bounds updates"
    return (
        f"gradient clipping shortened half of the last {len(factors)} updates to less than {median(factors):.2g} of "
        f"their length. Leave gradient clipping out: {bound}."
    )


def damping_above_curvature(facts: Facts) -> str | None:
    """Some layers have no direction whose curvature reaches the damping."""
    # Automatic damping follows the loss, and near the end of a training the curvature falls below it.
    if not facts.damped or not facts.below_damping or facts.automatic_damping:
        return None
    names = shortened(facts.below_damping, 4)
    return (
        f"damping ({facts.damping:.3g}) is above the largest curvature of {len(facts.below_damping)} of {facts.layers} "
        f"layers ({names}): their steps are those of plain SGD, with its learning rate divided by the damping. Lower "
        "the damping, unless the training is nearly done."
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
        # Inverses between two refreshes of factors would be the same.
        wanted = math.ceil(wanted / facts.factor_every_n_steps) * facts.factor_every_n_steps
    return f"{part} take {100 * share:.0f}% of the step. Set {option} to {wanted} (now {period})."


def longer_period(period: int, share: float, wanted: float) -> int:
    """The period at which a phase takes the wanted share of the time.

    Args:
        period: The present period, in steps.
        share: The present share of the time, below 1.
        wanted: The wanted share of the time, below 1.
    """
    # The phase takes share / (1 - share) of the rest of a step, divided by the period. Rounding must not add a step.
    ratio = share / (1 - share) * (1 - wanted) / wanted if share < 1 else 1000.0
    return max(period, math.ceil(period * ratio - 1e-9))


def many_undone_steps(facts: Facts) -> str | None:
    """Reviews undo many steps, and the learning rate has a part in their length."""
    undone = facts.undone_steps
    if undone < MANY or undone < MANY_UNDONE_SHARE * facts.steps:
        return None
    if facts.clip_factors and median(facts.clip_factors) < CUT_TO and not facts.plain_parameters:
        return None
    return (
        f"{undone} of {facts.steps} steps increased the loss of their own batch, and were undone or shortened. Lower "
        "the learning rate or the momentum of the optimizer."
    )


def small_coverage(facts: Facts) -> str | None:
    """Most parameters have a diagonal curvature or none, without `include` or `exclude`."""
    if facts.chosen_layers or facts.covered_parameters >= COVERED_SHARE * facts.trainable_parameters:
        return None
    share = facts.covered_parameters / facts.trainable_parameters
    return (
        f"only {100 * share:.0f}% of the trainable parameters have Kronecker factors; the start-up table has the "
        "reasons. Modules such as nn.Linear have them, without re-parametrised weights; for others register an adapter."
    )


def many_nonfinite_steps(facts: Facts) -> str | None:
    """Many steps are skipped for gradients that are not finite."""
    skipped, attempts = facts.nonfinite_steps, facts.steps + facts.nonfinite_steps
    if skipped < (MANY_SCALED if facts.gradient_scaler else MANY) or skipped < MANY_SHARE * attempts:
        return None
    found = f"{skipped} of {attempts} steps were skipped, since their gradients were not finite"
    if facts.gradient_scaler:
        return f"{found}: float16 overflows. Use precision='bf16-mixed', or lower the learning rate."
    return f"{found}. Look for a NaN in the data or the loss, or lower the learning rate."


def few_rows(facts: Facts) -> str | None:
    """Statistics come from one or two examples a step."""
    rows = facts.fewest_rows
    if rows is None or rows > FEW_ROWS or facts.steps < FIRST_STEPS:
        return None
    return (
        f"the factors of {facts.layer_of_fewest_rows!r} come from {rows} row(s) a step, and are nearly singular. If it "
        f"has a row for each example, set Trainer(accumulate_grad_batches={16 // rows}), or use larger batches."
    )


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
    few_rows,
)


class Adviser:
    """Applies the rules, and returns the advice of each rule once."""

    def __init__(self) -> None:
        self._silent = list(RULES)
        #: The advice so far, in order.
        self.given: list[str] = []

    def new(self, facts: Facts) -> list[str]:
        """The advice of rules that have given none before."""
        found = {rule: sentence for rule in self._silent if (sentence := rule(facts)) is not None}
        self._silent = [rule for rule in self._silent if rule not in found]
        self.given += found.values()
        return list(found.values())
