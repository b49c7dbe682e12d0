r"""A trust region whose radius follows the ratio of actual to expected decreases of the loss.

The radius r bounds :math:`\alpha^2\langle V, \nabla\bar W\rangle`, twice the KL of a step by the approximate Fisher
matrix (:math:`\kappa` of E7). A step :math:`\delta` is *reviewed* by the reduction ratio
:math:`\rho = (h(\theta+\delta) - h(\theta)) / M(\delta)`, both losses on the step's own batch, with
:math:`M(\delta) = \langle\nabla h, \delta\rangle + \tfrac12\delta^\top F\delta + \tfrac\lambda2\|\delta\|^2`
(Martens & Grosse 2015, arXiv:1503.05671, sec. 6.4 and 6.5). Between reviews, and where there are none, the radius
follows c, the slope of the last step on the next batch (:mod:`~lightning_kfc.trust_region.next_slope`). c near 0 while
the losses of new batches do not fall is noise, and shortens the steps.

No constant has a unit. The radius starts at a share of the loss. The automatic damping of a layer is

.. math:: \lambda = 3\cdot10^{-6}\; h(\theta) / \overline{w^2}

with :math:`\overline{w^2}` the mean square of the layer's weights at the start of training, and at most 100 times the
layer's mean curvature. It filters the noise of a batch less and less as the loss falls. That is right where the
curvature falls as well, as with sure and right labels. Elsewhere, in a layer with a dense factor A of d inputs and with
n rows in a step, the damping is at least

.. math:: 3\cdot10^{-6}\; \frac dn \sqrt{h_0\,h(\theta)} / \overline{w^2}

with the first loss :math:`h_0`, and at most 10 times the layer's mean curvature. The damping is not adapted by reviews:
on the step's own batch a smaller damping looks better, since the step fits this batch alone. Radius and damping are
covariant: a loss times c, and inputs or outputs in other units, give the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_kfc.curvature.loss_magnitude import LossMagnitude
from lightning_kfc.scheduling.refresh_schedule import LATER_FROM
from lightning_kfc.settings import Settings
from lightning_kfc.trust_region.outcome import Outcome, Verdict
from lightning_kfc.trust_region.running_mean import RunningMean

#: The first automatic radius, and the one from which it goes on without reviews, as shares of the loss.
START_RADIUS, UNREVIEWED_RADIUS = 0.04, 0.013
#: The smallest and the largest automatic radius, as shares of the loss.
SMALLEST_RADIUS, LARGEST_RADIUS = 1e-6, 10.0
#: An automatic damping, as a share of the loss, for weights of mean square 1.
DAMPING = 3e-6

#: The number of first steps that are all reviewed, the period of reviews afterwards, and that from step LATER_FROM on.
REVIEWED_AT_FIRST = 5
REVIEW_EVERY_N_STEPS, LATER_REVIEWS = 10, 50
#: The radius follows c, the slope of the last step on the next batch, by exp(NEXT_SLOPE c) a step.
NEXT_SLOPE = 0.35
#: A review doubles the radius only if the mean of c over recent steps is at least this. On a batch smaller than the
#: number of parameters of a layer, a long step fits the batch, and its own loss alone would lengthen it for ever.
LEAST_NEXT_SLOPE = 0.1
#: While that mean is smaller and the loss does not fall, c counts as at most this, since the steps fit noise.
STALLED_SLOPE = -0.5
#: The smallest radius to which this leads, as a share of the loss.
SMALLEST_STALLED_RADIUS = 1e-3
#: Decays of the running means: of c, and of the loss over recent and over earlier steps.
RECENT_DECAY, EARLIER_DECAY = 0.9, 0.98

POOR, GOOD = 0.25, 0.75
#: The radius does not grow beyond this multiple of a step's size, where it bounds nothing.
MOST_ROOM = 8.0
#: A step is undone if the loss has grown by more than this share of the decrease that its slope predicted.
TOLERATED_GROWTH = 0.1
#: Reviewed steps in a row with a growing loss that end the reviews, if it has not halved since the first: a radius
#: 4,000 times smaller does not help either.
MOST_RAISED = 12
#: The largest slope of a step, as a multiple of a loss that cannot fall below 0. A quadratic model decreases by half of
#: its slope until its minimum, so a larger slope predicts a decrease by more than the whole loss.
MOST_PROMISED = 2.0
#: A step that exceeds the running geometric mean of sizes by this factor comes from an outdated inverse.
SURPRISE = 3.0
SIZE_DECAY = 0.9


@dataclass
class TrustRegion:
    """The radius, the unit of radius and damping, and the dates of reviews.

    Attributes:
        adapts_radius: Whether the radius is adapted (``kl_clip="auto"``): by reviews, and by c.
        automatic_radius: Whether the radius is not the user's.
        radius: The bound on a step's squared norm in the Fisher metric; NaN before the first loss.
        loss: The magnitude of the loss at the last refresh; NaN before the first.
        reviews: Whether steps are reviewed. If not, an adapted radius follows c alone.
        review_next: Whether the next step is reviewed irrespective of its number.
        stepped_at: The number of the last step.
        log_size: Running mean of the logarithm of a step's squared norm; NaN before there is one.
        first_loss: The magnitude of the loss at the first refresh; NaN before.
        poor: Whether the last reviewed step decreased the loss by much less than expected.
        raised: The number of reviewed steps in a row that raised the loss beyond the tolerance, while it did not halve.
        raised_from: The loss before the first of these.
        recent_slopes: The mean of c over recent steps.
        recent_losses: The mean loss of recent steps, each before the step.
        earlier_losses: The mean loss over more steps.
    """

    adapts_radius: bool
    automatic_radius: bool = True
    radius: float = math.nan
    loss: float = math.nan
    reviews: bool = True
    review_next: bool = False
    stepped_at: int = 0
    log_size: float = math.nan
    first_loss: float = math.nan
    poor: bool = False
    raised: int = 0
    raised_from: float = math.nan
    recent_slopes: RunningMean = field(default_factory=lambda: RunningMean(RECENT_DECAY))
    recent_losses: RunningMean = field(default_factory=lambda: RunningMean(RECENT_DECAY))
    earlier_losses: RunningMean = field(default_factory=lambda: RunningMean(EARLIER_DECAY))

    @classmethod
    def of(cls, settings: Settings) -> TrustRegion:
        """The trust region at the start of training."""
        automatic = settings.kl_clip == "auto"
        return cls(adapts_radius=automatic, automatic_radius=automatic, reviews=automatic)

    @property
    def damping(self) -> float:
        r"""The automatic damping for weights of mean square 1; NaN before the first loss."""
        return DAMPING * self.loss

    @property
    def noise_damping(self) -> float:
        """The least automatic damping against the noise of a batch; NaN before the first loss.

        It is for weights of mean square 1, and a layer with as many inputs as rows in a step.
        """
        return DAMPING * LossMagnitude(self.first_loss, self.loss).usual

    def note_loss(self, loss: float, *, never_negative: bool) -> None:
        """Set the magnitude of a loss as the unit of radius and damping, unless it is 0 or not finite.

        Args:
            loss: The loss of a step.
            never_negative: Whether the loss is known to be bounded below by 0.
        """
        noted = LossMagnitude(self.first_loss, self.loss).with_loss(loss, never_negative=never_negative)
        self.first_loss, self.loss = noted.first, noted.last
        if self.automatic_radius and math.isnan(self.radius):
            self.radius = (START_RADIUS if self.reviews else UNREVIEWED_RADIUS) * self.loss

    def note_step_loss(self, loss: float) -> None:
        """Note the loss of a step, before the step, unless it is not finite."""
        if math.isfinite(loss):
            self.recent_losses = self.recent_losses.with_value(loss)
            self.earlier_losses = self.earlier_losses.with_value(loss)

    def most_decrease(self, loss: float) -> float | None:
        """The largest slope of a step; None for no bound.

        Args:
            loss: The loss of the step, which cannot fall below 0.
        """
        return MOST_PROMISED * loss if self.adapts_radius and math.isfinite(loss) and loss > 0 else None

    def end_reviews(self, *, fixed: bool) -> bool:
        """Review no further steps, and set the radius to a share of the loss.

        Args:
            fixed: Whether the radius stays there. If not, it follows c.

        Returns:
            Whether steps were reviewed before.
        """
        reviewed, self.reviews = self.reviews, False
        self.adapts_radius = self.adapts_radius and not fixed
        if reviewed:
            self.radius = UNREVIEWED_RADIUS * self.loss
        return reviewed

    def review_planned(self, step: int) -> bool:
        """Whether a step is due for review, so that its forward must be recorded."""
        every = REVIEW_EVERY_N_STEPS if step < LATER_FROM else LATER_REVIEWS
        # Where another optimizer steps, the forwards until this one's next step are not recorded for long.
        soon = self.review_next and step - self.stepped_at <= REVIEW_EVERY_N_STEPS
        return self.reviews and (soon or step < REVIEWED_AT_FIRST or step % every == 0)

    def note_size(self, size: float) -> None:
        r"""Note the size of the coming step; plan a review if it is surprisingly large.

        Args:
            size: :math:`\alpha^2\langle V, \nabla\bar W\rangle` before clipping, positive.
        """
        log_size = math.log(size)
        self.review_next = log_size > self.log_size + math.log(SURPRISE)
        known = math.isfinite(self.log_size)
        self.log_size = SIZE_DECAY * self.log_size + (1 - SIZE_DECAY) * log_size if known else log_size

    def follow_next_slope(self, share: float) -> None:
        r"""Adjust the radius by the slope of the last step on the next batch.

        Args:
            share: c of :mod:`~lightning_kfc.trust_region.next_slope`; a value that is not finite counts as -1.
        """
        if not self.adapts_radius or not math.isfinite(self.radius):
            return
        share = min(max(share, -1.0), 1.0) if math.isfinite(share) else -1.0
        self.recent_slopes = self.recent_slopes.with_value(share)
        if self._stalls():
            share = min(share, STALLED_SLOPE if self.radius > SMALLEST_STALLED_RADIUS * self.loss else 0.0)
        if share > 0 and self.radius > MOST_ROOM * math.exp(self.log_size):
            return
        self.radius *= math.exp(NEXT_SLOPE * share)
        self._limit_radius()

    def _stalls(self) -> bool:
        """Whether steps leave no slope on the next batch, and the losses of new batches do not fall all the same."""
        return self.recent_slopes.value < LEAST_NEXT_SLOPE and self.recent_losses.value >= self.earlier_losses.value

    def _limit_radius(self) -> None:
        self.radius = min(max(self.radius, SMALLEST_RADIUS * self.loss), LARGEST_RADIUS * self.loss)

    def judge(self, outcome: Outcome, size: float) -> Verdict:
        r"""Adjust the radius by a reviewed step, and decide on the step itself.

        Args:
            outcome: The losses and the expected change.
            size: :math:`\alpha^2\langle V, \nabla\bar W\rangle` before clipping.
        """
        ratio = outcome.ratio
        growth = outcome.loss_after - outcome.loss_before
        undo = not growth <= TOLERATED_GROWTH * abs(outcome.slope)
        # Includes a ratio of NaN, and an increase of both loss and model.
        poor = undo or not ratio >= POOR
        if self.adapts_radius and math.isfinite(self.radius):
            if poor:
                self.radius = 0.5 * min(self.radius, size)
            elif ratio > GOOD and not self.recent_slopes.value < LEAST_NEXT_SLOPE:
                self.radius = min(2 * self.radius, MOST_ROOM * size)
            self._limit_radius()
        # If new statistics have not helped, and the loss falls all the same, both wait for their dates.
        hurry = poor and not (self.poor and growth < 0)
        self.poor = poor
        # Near a kink of the loss each step is shortened, and the shortened steps bring it to its minimum.
        halved = self.raised_from - outcome.loss_before > 0.5 * abs(self.raised_from)
        if not undo or not self.raised or halved:
            self.raised, self.raised_from = 0, outcome.loss_before
        self.raised += undo
        self.review_next = self.review_next or hurry
        # A step whose slope leads uphill, as with momentum, is kept unless the loss has grown.
        shorten = undo or (poor and outcome.slope < 0)
        kept_share = min(outcome.best_share(), 1.0) if shorten else 1.0
        return Verdict(ratio, undo, hurry, -outcome.expected, -growth, kept_share)

    def state_dict(self) -> dict[str, Any]:
        """All state that changes in training, in plain containers."""
        values = {name: getattr(self, name) for name in self._changing()}
        return {n: v.state() if isinstance(v, RunningMean) else float(v) for n, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`; fixed settings stay unchanged."""
        for name in self._changing():
            own = getattr(self, name)
            if name in state:
                found = own.loaded(state[name]) if isinstance(own, RunningMean) else type(own)(state[name])
                setattr(self, name, found)

    def _changing(self) -> list[str]:
        names = ["loss", "first_loss", "review_next", "stepped_at", "log_size", "poor", "raised", "raised_from"]
        names += ["recent_slopes", "recent_losses", "earlier_losses"]
        return ["radius", "reviews", *names] if self.automatic_radius else names
