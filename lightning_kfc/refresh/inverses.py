"""Refreshes the inverses of layers, where due."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.factors.inverses import INVERSES, Inverse
from lightning_kfc.monitoring.events import Events
from lightning_kfc.refresh.inverse_exchange import InverseExchange
from lightning_kfc.scheduling.tracker import Due
from lightning_kfc.settings import Settings


class Inverting:
    """Refreshes inverses, where due; where one cannot be made, the last good one stays in use.

    Args:
        settings: The kind of inverse.
        due: When each layer is due; told what was done.
        events: Counts what goes other than planned.
        ownership: Knows which rank holds what.
    """

    def __init__(self, settings: Settings, due: Due, events: Events, ownership: LayerOwnership) -> None:
        self._chosen = INVERSES[settings.inverse]
        self._due = due
        self._events = events
        self._ownership = ownership
        self._exchange = InverseExchange(ownership)

    def sends(self, layers: Iterable[str], step: int, damping: float) -> bool:
        """Whether a refresh of these layers at this step sends inverses between ranks."""
        return any(self._due.has_statistics(name) and self._due.inverse(name, step, damping) for name in layers)

    def __call__(self, layers: Sequence[Layer], step: int, damping: float) -> None:
        """Refresh the inverses of these layers that are due at this step."""
        due = [
            layer
            for layer in layers
            if (layer.averages or not self._ownership.has_factors(layer)) and self.sends([layer.name], step, damping)
        ]
        if not due:
            return
        self._ownership.communication.begin("inverses")
        results = self._exchange.refreshed(
            due, lambda layer: layer.refreshed(self._chosen, damping), lambda layer: layer.inverse_type(self._chosen)
        )
        for layer in due:
            self._due.factorised(layer.name, step, damping)
            layer.factorised_at = step
            result = results[layer.name]
            if isinstance(result, Inverse):
                layer.take(result)
                continue
            self._events.count("failed_factorisations")
            kept = "the last good inverse is kept" if layer.inverse is not None else "its plain gradient is used"
            if distributed.rank() == 0:
                warnings.warn(f"KFC at step {step}, layer {layer.name!r}: {result}; {kept}.", stacklevel=2)
