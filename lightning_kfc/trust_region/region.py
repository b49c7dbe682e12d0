r"""A trust region that adapts radius and damping to how well steps are predicted.

The radius r bounds :math:`\alpha^2\langle V, \nabla\bar W\rangle`, twice the KL of a step by the approximate Fisher
matrix (:math:`\kappa` of E7). A step :math:`\delta` is *reviewed* by the reduction ratio
:math:`\rho = (h(\theta+\delta) - h(\theta)) / M(\delta)`, both losses on the step's own batch, with
:math:`M(\delta) = \langle\nabla h, \delta\rangle + \tfrac12\delta^\top F\delta + \tfrac\lambda2\|\delta\|^2`
(Martens & Grosse 2015, arXiv:1503.05671, sec. 6.4 and 6.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lightning_kfc.settings import Settings

#: Start values of an automatic radius and damping.
START_RADIUS = 0.1
START_DAMPING = 0.003
#: Used in the place of "auto" where steps cannot be reviewed.
FIXED_RADIUS = 0.03
FIXED_DAMPING = 0.01

#: Every one of the first steps is reviewed, then one in so many.
REVIEWED_AT_FIRST = 10
REVIEW_EVERY_N_STEPS = 5

# On a noisy batch a smaller damping always looks better, since a step then fits that batch alone. Without these floors
# damping and radius would shrink towards 0.
SMALLEST_RADIUS, LARGEST_RADIUS = 1e-3, 10.0
SMALLEST_DAMPING, LARGEST_DAMPING = 1e-3, 10.0

POOR, GOOD, DAMPING_GOOD = 0.25, 0.75, 0.45
DAMPING_FACTOR = 0.8
#: A step is undone if the loss has grown by more than this share of the decrease that its slope promised.
TOLERATED_GROWTH = 0.1
#: The slope of a step may promise at most so many times the loss, where the loss cannot fall below 0. At its minimum, a
#: quadratic model has decreased by half of what its slope promised: a longer step promises more than the whole loss.
MOST_PROMISED = 2.0
#: A step this many times its running (geometric) mean in size comes from an inverse that no longer fits.
SURPRISE = 3.0
SIZE_DECAY = 0.9


@dataclass(frozen=True)
class Outcome:
    r"""The losses before and after a step, and the expected change.

    Attributes:
        loss_before: :math:`h(\theta)` on the step's batch.
        loss_after: :math:`h(\theta+\delta)` on the same batch.
        slope: :math:`\langle\nabla h, \delta\rangle`, momentum and weight decay included in :math:`\delta`.
        curvature: :math:`\tfrac12\delta^\top F\delta` by the factors.
        squared_length: :math:`\|\delta\|^2` over the layers whose update was damped.
    """

    loss_before: float
    loss_after: float
    slope: float
    curvature: float
    squared_length: float

    def expected(self, damping: float) -> float:
        r""":math:`M(\delta)`, the expected change of the loss."""
        return self.slope + self.curvature + 0.5 * damping * self.squared_length

    def ratio(self, damping: float) -> float:
        r""":math:`\rho`, 1 for a step as expected; NaN where no change was expected."""
        expected = self.expected(damping)
        return (self.loss_after - self.loss_before) / expected if expected else math.nan

    def best_share(self) -> float:
        r"""The share of the step at which the loss is least, by a parabola.

        The parabola has the values :math:`h(\theta)` and :math:`h(\theta+\delta)`, and the slope of the step. The
        share is 0 where the loss is not finite or the step leads uphill; above 1 where the step could have been longer.
        """
        bend = self.loss_after - self.loss_before - self.slope
        if not (math.isfinite(bend) and self.slope < 0):
            return 0.0
        return -self.slope / (2 * bend) if bend > 0 else math.inf


@dataclass(frozen=True)
class Verdict:
    """The consequences of a review.

    Attributes:
        ratio: The reduction ratio.
        undo: Whether the loss has grown by more than is tolerated, so that the step is to be taken back.
        refresh: Whether statistics and inverses are to be refreshed at the next step.
        predicted_decrease: Of the loss, by the model of the curvature; NaN where it is not known.
        actual_decrease: Of the loss; negative where it grew.
        kept_share: The share of the step that is kept: 1 for all of it, 0 where it is taken back as a whole.
    """

    ratio: float
    undo: bool
    refresh: bool
    predicted_decrease: float = math.nan
    actual_decrease: float = math.nan
    kept_share: float = 1.0


@dataclass
class TrustRegion:
    """Radius and damping, and when the next step is reviewed.

    Attributes:
        adapts_radius: Whether the radius sets itself (``kl_clip="auto"``).
        adapts_damping: Whether the damping sets itself (``damping="auto"``).
        radius: The bound on a step's squared norm in the Fisher metric.
        damping: Added to the curvature from the next refresh of inverses on.
        review_next: Whether the next step is reviewed whatever its number.
        log_size: Running mean of the logarithm of a step's squared norm; NaN before there is one.
    """

    adapts_radius: bool
    adapts_damping: bool
    radius: float = START_RADIUS
    damping: float = START_DAMPING
    review_next: bool = False
    log_size: float = math.nan

    @classmethod
    def of(cls, settings: Settings) -> TrustRegion:
        """The trust region at the start of training."""
        # The rule "adam" does not use the damping.
        adapts_damping = settings.damping == "auto" and settings.rule == "natural"
        return cls(adapts_radius=settings.kl_clip == "auto", adapts_damping=adapts_damping)

    @property
    def active(self) -> bool:
        """Whether radius or damping set themselves."""
        return self.adapts_radius or self.adapts_damping

    def fix(self) -> dict[str, float]:
        """Set nothing automatically from now on.

        Returns:
            The fixed value of each setting that was ``"auto"``, by the setting's name.
        """
        fixed = {}
        if self.adapts_damping:
            self.damping = fixed["damping"] = FIXED_DAMPING
        if self.adapts_radius:
            self.radius = fixed["kl_clip"] = FIXED_RADIUS
        self.adapts_radius = self.adapts_damping = False
        return fixed

    def review_planned(self, step: int) -> bool:
        """Whether a step is to be reviewed, so that its forward must be recorded.

        Args:
            step: The optimizer step.
        """
        return self.review_next or step < REVIEWED_AT_FIRST or step % REVIEW_EVERY_N_STEPS == 0

    def note_size(self, size: float) -> None:
        r"""Note the size of the coming step; a surprisingly large one is followed by a review.

        Args:
            size: :math:`\alpha^2\langle V, \nabla\bar W\rangle` before clipping, positive.
        """
        log_size = math.log(size)
        self.review_next = log_size > self.log_size + math.log(SURPRISE)
        known = math.isfinite(self.log_size)
        self.log_size = SIZE_DECAY * self.log_size + (1 - SIZE_DECAY) * log_size if known else log_size

    def judge(self, outcome: Outcome, size: float) -> Verdict:
        r"""Draw the consequences of a reviewed step.

        Args:
            outcome: What it did.
            size: :math:`\alpha^2\langle V, \nabla\bar W\rangle` before clipping.
        """
        expected, ratio = outcome.expected(self.damping), outcome.ratio(self.damping)
        growth = outcome.loss_after - outcome.loss_before
        undo = not growth <= TOLERATED_GROWTH * abs(outcome.slope)
        # Also where the ratio is NaN, or where both the loss and the model increased.
        poor = undo or not ratio >= POOR
        if self.adapts_radius:
            if poor:
                self.radius = max(SMALLEST_RADIUS, 0.5 * min(self.radius, size))
            elif ratio > GOOD:
                self.radius = min(LARGEST_RADIUS, 2 * min(self.radius, 4 * size))
                self.radius = max(SMALLEST_RADIUS, self.radius)
        if self.adapts_damping:
            if poor:
                self.damping = min(LARGEST_DAMPING, self.damping / DAMPING_FACTOR)
            elif ratio > DAMPING_GOOD:
                self.damping = max(SMALLEST_DAMPING, self.damping * DAMPING_FACTOR)
        self.review_next = self.review_next or poor
        # A step whose slope leads uphill, as with momentum, is kept unless the loss has grown.
        shorten = undo or (poor and outcome.slope < 0)
        kept_share = min(outcome.best_share(), 1.0) if shorten else 1.0
        return Verdict(ratio, undo, poor, -expected, -growth, kept_share)

    def state_dict(self) -> dict[str, float]:
        """All that changes in training, as plain numbers, without fixed settings."""
        return {name: float(getattr(self, name)) for name in self._changing()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state of :meth:`state_dict`; fixed settings stay as they are."""
        for name in self._changing():
            if name in state:
                setattr(self, name, type(getattr(self, name))(state[name]))

    def _changing(self) -> list[str]:
        adapts = {"radius": self.adapts_radius, "damping": self.adapts_damping}
        names = [field.name for field in fields(self) if not field.name.startswith("adapts_")]
        return [name for name in names if adapts.get(name, True)]


def message_of_fixed(fixed: Mapping[str, float], reason: str) -> str:
    """The message that steps are no longer reviewed; empty if nothing was "auto".

    Args:
        fixed: What :meth:`TrustRegion.fix` returned.
        reason: Why steps cannot be reviewed.
    """
    if not fixed:
        return ""
    chosen = " and ".join(f"{name}='auto'" for name in fixed)
    values = " and ".join(f"{name}={value:.3g}" for name, value in fixed.items())
    need = "need" if len(fixed) > 1 else "needs"
    return (
        f"KFC can no longer review steps, which {chosen} {need}: {reason}. It goes on with {values}. "
        "Set these to silence this."
    )
