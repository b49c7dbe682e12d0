"""Refreshes the inverses of layers, where they are due and the layers have moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

from lightning_kfc import distributed
from lightning_kfc.due import Due
from lightning_kfc.exchange import Exchange
from lightning_kfc.factors.inverse import INVERSES, Inverse
from lightning_kfc.held import Unmoved
from lightning_kfc.layer import Layer
from lightning_kfc.monitor import Events
from lightning_kfc.origin import Origin
from lightning_kfc.settings import Settings


class Inverting:
    """Refreshes inverses, where due; where one cannot be made, the last good one stays in use.

    The rank that makes an inverse decides whether to, since ranks that hold equal factors may round differently.

    Args:
        settings: The kind of inverse, and when to do without a new one.
        due: When each layer is due; told what was done.
        events: Counts what goes other than planned.
        exchange: Knows which rank holds what.
        say: Takes a line that tells how the first inverses get on, where they take long.

    Attributes:
        skipped: How many inverses, that were due, were not refreshed, since their layers had not moved enough.
    """

    def __init__(
        self, settings: Settings, due: Due, events: Events, exchange: Exchange, say: Callable[[str], None]
    ) -> None:
        self._chosen = INVERSES[settings.inverse]
        self._tolerance = settings.inverse_tolerance
        self._due = due
        self._events = events
        self._exchange = exchange
        self._say: Callable[[str], None] | None = say
        self.skipped = 0

    def sends(self, layers: Iterable[str], step: int, damping: float) -> bool:
        """Whether a refresh of these layers at this step sends inverses between ranks."""
        return any(self._due.has_statistics(name) and self._due.inverse(name, step, damping) for name in layers)

    def __call__(self, layers: Sequence[Layer], step: int, damping: float) -> None:
        """Refresh the inverses of these layers that are due at this step."""
        due = [
            layer
            for layer in layers
            if (layer.averages or not self._exchange.has_factors(layer)) and self.sends([layer.name], step, damping)
        ]
        if not due:
            return
        # The later ones take as long, which is known by then.
        say, self._say = self._say, None
        origins: dict[str, Origin] = {}
        if self._tolerance > 0:
            origins = {layer.name: layer.origin_of(damping) for layer in due if layer.averages}

        def make(layer: Layer) -> Inverse | Unmoved:
            if self._unmoved(layer, origins.get(layer.name)):
                return Unmoved()
            return layer.refreshed(self._chosen, damping)

        self._exchange.communication.begin("inverses")
        results = self._exchange.refreshed(due, make, lambda layer: layer.inverse_type(self._chosen), say)
        for layer in due:
            result = results[layer.name]
            self._due.factorised(layer.name, step, damping)
            if isinstance(result, Unmoved):
                self.skipped += 1
                continue
            layer.factorised_at = step
            if isinstance(result, Inverse):
                layer.take(result, origins.get(layer.name))
                continue
            self._events.count("failed_factorisations")
            kept = "the last good inverse is kept" if layer.inverse is not None else "its plain gradient is used"
            if distributed.rank() == 0:
                warnings.warn(f"KFC at step {step}, layer {layer.name!r}: {result}; {kept}.", stacklevel=2)

    def _unmoved(self, layer: Layer, now: Origin | None) -> bool:
        """Whether the inverse in use will do: a comparison that no NaN passes."""
        before = layer.origin
        # A bad step has all inverses refreshed, and layers that start anew have no origin.
        if before is None or now is None or layer.inverse is None or self._due.refreshed_at(layer.name)[1] is None:
            return False
        of_damping = not layer.inverse_type(self._chosen).follows_damping
        return before.change_to(now, of_damping=of_damping) <= self._tolerance
