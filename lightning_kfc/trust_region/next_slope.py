r"""The slope of a step on the next batch, which shows noise: a step that fits its own batch need not be a good one.

With the update V of a step and the gradients :math:`g` of its batch and :math:`g'` of the next one,

.. math:: c = \langle V, g' \rangle / \langle V, g \rangle

is 1 while a step is short beside the distance to the minimum along V, 0 where the population's loss has its minimum at
the step's end, and negative where the step was too long: beyond that minimum, or along what only its own batch wanted.
It costs an inner product. No evaluation is made, and nothing of the user's runs again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.factors.quadratic_form import inner_product
from lightning_kfc.trust_region.region import TrustRegion


@dataclass(frozen=True)
class LastUpdate:
    r"""The update of one step.

    Attributes:
        rates: The learning rate of each layer, by name.
        updates: V of each layer, shape ``(groups, d_out, d_in)``.
        slope: :math:`\sum\alpha\langle V, g\rangle` on the step's own batch; 0 where the step was not made like this.
    """

    rates: Mapping[str, float]
    updates: Mapping[str, Tensor]
    slope: float

    def next_share(self, gradients: Mapping[str, Tensor]) -> float | None:
        """c, for the gradients of the next batch; None where there is none, or they are of other layers or shapes."""
        if not (math.isfinite(self.slope) and self.slope > 0) or gradients.keys() != self.updates.keys():
            return None
        if any(gradients[name].shape != update.shape for name, update in self.updates.items()):
            return None
        products = [inner_product(update, gradients[name]) * self.rates[name] for name, update in self.updates.items()]
        return float(torch.stack([product.double() for product in products]).sum()) / self.slope


class LastUpdates:
    """Keeps the last update of each optimizer until its next step, while the radius sets itself.

    Args:
        region: Its radius follows c.
    """

    def __init__(self, region: TrustRegion) -> None:
        self._region = region
        self._kept: list[LastUpdate] = []

    def follow(self, gradients: Mapping[str, Tensor]) -> None:
        """Let the radius follow how the last step of these layers fits the present batch.

        Args:
            gradients: By layer, shape ``(groups, d_out, d_in)``.
        """
        shares = (last.next_share(gradients) for last in self._kept)
        share = next((share for share in shares if share is not None), None)
        if share is not None:
            self._region.follow_next_slope(share)

    def keep(self, rates: Mapping[str, float], updates: Sequence[Tensor], slope: float) -> None:
        """Keep the updates of a step in the place of earlier ones of the same layers.

        Args:
            rates: The learning rates, by layer.
            updates: One for each of them.
            slope: Of the step on its own batch; one that does not lead downhill has no c.
        """
        self._kept = [last for last in self._kept if last.updates.keys().isdisjoint(rates)]
        if self._region.adapts_radius:
            self._kept.append(LastUpdate(rates, dict(zip(rates, updates, strict=True)), slope))

    def forget(self) -> None:
        """Have no c of the last step, since it was not made as it was meant."""
        self._kept = [replace(last, slope=0.0) for last in self._kept]

    def nbytes(self) -> int:
        """The bytes that the updates hold."""
        return sum(update.numel() * update.element_size() for last in self._kept for update in last.updates.values())

    def state(self) -> list[dict[str, Any]]:
        """The updates in plain containers."""
        return [{"rates": dict(e.rates), "updates": dict(e.updates), "slope": e.slope} for e in self._kept]

    def load(self, state: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Take over what :meth:`state` returned."""
        self._kept = [
            LastUpdate(
                dict(entry["rates"]),
                {name: update.to(device) for name, update in entry["updates"].items()},
                float(entry["slope"]),
            )
            for entry in state
        ]
