"""A trust region for each optimizer, since losses of several have different magnitudes and need different radii."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_kfc.monitoring.events import Events
from lightning_kfc.settings import Settings
from lightning_kfc.trust_region.losses_seen import LossesSeen
from lightning_kfc.trust_region.next_slope import LastUpdates
from lightning_kfc.trust_region.region import TrustRegion
from lightning_kfc.trust_region.scheduled_damping import ScheduledDamping


class TrustRegions:
    """The trust regions of all optimizers, of which one is that of the present step; damping and bound in force.

    Args:
        settings: The settings; ``"auto"`` for ``damping`` or ``kl_clip`` stands for the region's damping or radius.
        losses: The losses of the coming steps, which know the optimizers.
        events: Counts invalid dampings.

    Attributes:
        present: The region of the present step, or else of the last one.
        last_updates: The last updates, whose slopes on the next batch adjust the radius.
        scheduled_damping: The user's damping; None for an automatic one.
    """

    def __init__(self, settings: Settings, losses: LossesSeen, events: Events) -> None:
        self._settings, self._losses = settings, losses
        self.present = TrustRegion.of(settings)
        self._all = [self.present]
        self.last_updates = LastUpdates()
        # The optimizer's learning rate at the last step of each layer.
        self._rates: dict[str, float] = {}
        self.scheduled_damping = None if settings.damping == "auto" else ScheduledDamping(settings.damping, events)

    def damping_at(self, step: int) -> float:
        """The damping in force at a step."""
        return self.present.damping if self.scheduled_damping is None else self.scheduled_damping.at(step)

    @property
    def kl_clip(self) -> float | None:
        """The present bound on the squared norm of a step; None for no bound."""
        bound = self._settings.kl_clip
        return self.present.radius if bound == "auto" else bound

    def follow_rates(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Note the optimizer's learning rates of a step.

        Args:
            rates: By layer.

        Returns:
            The last rate over this one for each layer whose rate has risen; none if steps have no bound.
        """
        if self.kl_clip is None:
            return {}
        last = {name: self._rates.get(name, math.inf) for name in rates}
        self._rates |= rates
        return {name: last[name] / rate for name, rate in rates.items() if rate > last[name]}

    def follow_next_slope(self, gradients: Mapping[str, Tensor]) -> None:
        """Adjust the present radius by c of the last step of these layers, from the present batch.

        Args:
            gradients: By layer, shape ``(groups, d_out, d_in)``.
        """
        share = self.last_updates.next_share(gradients)
        if share is not None:
            self.present.follow_next_slope(share)

    def keep_update(self, rates: Mapping[str, float], updates: Sequence[Tensor], slope: float) -> None:
        """Hold the updates of a step until the next one, if the radius follows c; see :meth:`LastUpdates.keep`."""
        if self.present.adapts_radius:
            self.last_updates.keep(rates, updates, slope)

    def __iter__(self) -> Iterator[TrustRegion]:
        return iter(self._all)

    def select(self, parameters: Iterable[Tensor]) -> TrustRegion:
        """Make the region of an optimizer the present one.

        Args:
            parameters: The optimizer's parameters.

        Returns:
            The region; a new one for an optimizer that has not stepped before.
        """
        number = self._losses.optimizer_of(parameters)
        while number >= len(self._all):
            self._all.append(self._new())
        self.present = self._all[number]
        return self.present

    def _new(self) -> TrustRegion:
        region = TrustRegion.of(self._settings)
        if not self.reviewing:
            region.end_reviews(fixed=not self._all[0].adapts_radius)
        return region

    def give_unit(self) -> None:
        """Give the present region the unit of another one if no loss of its own is known."""
        known = (region.loss for region in self._all if not math.isnan(region.loss))
        if math.isnan(self.present.loss) and (loss := next(known, None)):
            self.present.note_loss(loss, never_negative=True)

    @property
    def reviewing(self) -> bool:
        """Whether steps of any optimizer are reviewed."""
        return any(region.reviews for region in self._all)

    def review_planned(self, step: int) -> bool:
        """Whether a step of any optimizer is due for review; which one steps next is not known before its forward."""
        return any(region.review_planned(step) for region in self._all)

    def end_reviews(self, *, fixed: bool) -> bool:
        """Review no further steps of any optimizer; see :meth:`TrustRegion.end_reviews`.

        Returns:
            Whether steps were reviewed before.
        """
        reviewed = [region.end_reviews(fixed=fixed) for region in self._all]
        return any(reviewed)

    def state_dict(self) -> dict[str, Any]:
        """The state of the first region, of the others if there are any, in the optimizers' order, and the rates."""
        first, *others = (region.state_dict() for region in self._all)
        return first | ({"others": others} if others else {}) | ({"rates": dict(self._rates)} if self._rates else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`; fixed settings stay unchanged."""
        self._all, self._rates = self._all[:1], dict(state.get("rates", {}))
        self.present = self._all[0]
        self.present.load_state_dict(state)
        for other in state.get("others", ()):
            self._all.append(self._new())
            self._all[-1].load_state_dict(other)
