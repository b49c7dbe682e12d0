"""A trust region for each optimizer, since losses of several have different magnitudes and need different radii."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_kfc.settings import Settings
from lightning_kfc.trust_region.losses_seen import LossesSeen
from lightning_kfc.trust_region.region import TrustRegion


class TrustRegions:
    """The trust regions of all optimizers, of which one is that of the present step.

    Args:
        settings: The settings.
        losses: The losses of the coming steps, which know the optimizers.

    Attributes:
        present: The region of the present step, or else of the last one.
    """

    def __init__(self, settings: Settings, losses: LossesSeen) -> None:
        self._settings, self._losses = settings, losses
        self.present = TrustRegion.of(settings)
        self._all = [self.present]

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
        """The state of the first region, and of the others if there are any, in the order of the optimizers."""
        first, *others = (region.state_dict() for region in self._all)
        return first | ({"others": others} if others else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`; fixed settings stay unchanged."""
        states = [state, *state.get("others", ())]
        self._all = self._all[:1] + [TrustRegion.of(self._settings) for _ in states[1:]]
        self.present = self._all[0]
        for region, own in zip(self._all, states, strict=True):
            region.load_state_dict(own)
