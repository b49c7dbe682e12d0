"""Refresh the inverses of layers, if due."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.factors.inverses import FactorisationError, Inverse
from lightning_kfc.monitoring.events import Events
from lightning_kfc.refresh.inverse_exchange import InverseExchange
from lightning_kfc.scheduling.tracker import RefreshTracker


class InverseRefresh:
    """Refreshes inverses, if due; after a failure the last good inverse stays in use.

    Args:
        kind: The user's kind of inverse.
        tracker: The dates of each layer.
        events: Counts irregular events.
        ownership: The ranks that hold factors and inverses.
    """

    def __init__(self, kind: type[Inverse], tracker: RefreshTracker, events: Events, ownership: LayerOwnership) -> None:
        self._kind = kind
        self._tracker = tracker
        self._events = events
        self._ownership = ownership
        self._exchange = InverseExchange(ownership, kind)

    def dated(self, layers: Iterable[str], step: int) -> list[str]:
        """The layers with statistics whose inverse is due at this step, or was due and missed."""
        return [name for name in layers if self._tracker.has_statistics(name) and self._tracker.new_inverse(name, step)]

    def outdated(self, dated: Iterable[str], damping: float) -> list[str]:
        """The dated layers whose inverses would change."""
        return [name for name in dated if self._tracker.inverse_outdated(name, damping)]

    def __call__(self, layers: Sequence[Layer], step: int, damping: float, noise_damping: float) -> None:
        """Refresh the inverses of layers with factors. Collective: call on every rank.

        Args:
            layers: The layers that are due.
            step: The optimizer step.
            damping: The damping in force.
            noise_damping: See :class:`~lightning_kfc.trust_region.region.TrustRegion`.
        """
        due = [layer for layer in layers if layer.averages or not self._ownership.has_factors(layer)]
        if not due:
            return
        self._ownership.communication.begin("inverses")
        outcomes = self._exchange.refreshed(due, damping, noise_damping)
        for layer in due:
            self._tracker.inverse_refreshed(layer.name, step, damping)
            outcome = outcomes[layer.name]
            if isinstance(outcome, Inverse):
                layer.take(outcome, step)
            else:
                self._failed(layer, outcome, step)

    def _failed(self, layer: Layer, error: FactorisationError, step: int) -> None:
        self._events.count("failed_factorisations")
        kept = "the last good inverse is kept" if layer.inverse is not None else "its plain gradient is used"
        if distributed.rank() == 0:
            warnings.warn(f"KFC at step {step}, layer {layer.name!r}: {error}; {kept}.", stacklevel=2)
