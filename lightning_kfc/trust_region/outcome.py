"""The losses before and after a step, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_kfc.monitoring.events import StepNumbers


@dataclass(frozen=True)
class Outcome:
    r"""The losses before and after a step, and the expected change.

    Attributes:
        loss_before: :math:`h(\theta)` on the step's batch.
        loss_after: :math:`h(\theta+\delta)` on the same batch.
        slope: :math:`\langle\nabla h, \delta\rangle`, momentum and weight decay included in :math:`\delta`.
        curvature: :math:`\tfrac12\delta^\top F\delta` by the factors.
        penalty: :math:`\tfrac\lambda2\|\delta\|^2`, summed over the layers whose update was damped.
    """

    loss_before: float
    loss_after: float
    slope: float
    curvature: float
    penalty: float

    @property
    def expected(self) -> float:
        r""":math:`M(\delta)`, the expected change of the loss."""
        return self.slope + self.curvature + self.penalty

    @property
    def ratio(self) -> float:
        r""":math:`\rho`, 1 for a step as expected; NaN if no change was expected."""
        expected = self.expected
        return (self.loss_after - self.loss_before) / expected if expected else math.nan

    def best_share(self) -> float:
        r"""The share of the step at which the loss is least, by a parabola.

        The parabola has the values :math:`h(\theta)` and :math:`h(\theta+\delta)`, and the slope of the step. The
        share is 0 if the loss is not finite or the step leads uphill; it exceeds 1 if the step was too short.
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
        undo: Whether the loss has increased by more than the tolerance.
        refresh: Whether to refresh statistics and inverses at the next step.
        predicted_decrease: The loss's decrease by the quadratic model; NaN if unknown.
        actual_decrease: The loss's decrease; negative if it grew.
        kept_share: The kept share of the step: 1 for the whole step, 0 for none.
    """

    ratio: float
    undo: bool
    refresh: bool
    predicted_decrease: float = math.nan
    actual_decrease: float = math.nan
    kept_share: float = 1.0

    def added_to(self, numbers: StepNumbers) -> StepNumbers:
        """Add the numbers of this review to those of a step."""
        return replace(
            numbers,
            reduction_ratio=self.ratio,
            predicted_decrease=self.predicted_decrease,
            actual_decrease=self.actual_decrease,
        )
