r"""The slope of a step on the next batch, which separates progress from a fit to the step's own batch.

With the update V of a step and the gradients :math:`g` of its batch and :math:`g'` of the next one,

.. math:: c = \langle V, g' \rangle / \langle V, g \rangle

is near 1 if the step is short relative to the distance to the minimum along V, 0 if the population's loss has its
minimum at the step's end, and negative if the step is longer. It costs one inner product and no evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.factors.quadratic_form import inner_product


@dataclass(frozen=True)
class LastUpdate:
    r"""The update of one step.

    Attributes:
        rates: The learning rate of each layer, by name.
        updates: V of each layer, shape ``(groups, d_out, d_in)``.
        slope: :math:`\sum\alpha\langle V, g\rangle` on the step's own batch; 0 if the step was changed afterwards.
    """

    rates: Mapping[str, float]
    updates: Mapping[str, Tensor]
    slope: float

    def next_share(self, gradients: Mapping[str, Tensor]) -> float | None:
        """c, from the gradients of the next batch; None without a slope, or if layers or shapes differ."""
        if not (math.isfinite(self.slope) and self.slope > 0) or gradients.keys() != self.updates.keys():
            return None
        pairs = [(update, gradients[name]) for name, update in self.updates.items()]
        if any(update.shape != gradient.shape for update, gradient in pairs):
            return None
        rates = [self.rates[name] for name in self.updates]
        # An update of a checkpoint may have another precision.
        products = [inner_product(u.to(g), g) * rate for (u, g), rate in zip(pairs, rates, strict=True)]
        return float(torch.stack([product.double() for product in products]).sum()) / self.slope


class LastUpdates:
    """Holds the last update of each optimizer until its next step."""

    def __init__(self) -> None:
        self._kept: list[LastUpdate] = []

    def next_share(self, gradients: Mapping[str, Tensor]) -> float | None:
        """Return c of the last step of these layers, from the present batch; None if there is none.

        Args:
            gradients: By layer, shape ``(groups, d_out, d_in)``.
        """
        shares = (last.next_share(gradients) for last in self._kept)
        return next((share for share in shares if share is not None), None)

    def keep(self, rates: Mapping[str, float], updates: Sequence[Tensor], slope: float) -> None:
        """Replace the held updates of the same layers by those of a new step.

        Args:
            rates: The learning rates, by layer.
            updates: One per layer.
            slope: The slope on the step's own batch; a step without a positive one has no c.
        """
        self._kept = [last for last in self._kept if last.updates.keys().isdisjoint(rates)]
        if rates:
            self._kept.append(LastUpdate(rates, dict(zip(rates, updates, strict=True)), slope))

    def forget(self) -> None:
        """Drop c of the last step, which was changed or undone."""
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
