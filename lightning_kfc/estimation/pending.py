"""Statistics that wait for their step's refresh, and layers whose gradient has a part without statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.distributed.process_group import ProcessGroup
from lightning_kfc.estimation.estimator import Estimator
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.monitoring.events import Events, listed
from lightning_kfc.scheduling.tracker import RefreshTracker

#: Why layers with a gradient have no curvature, with the way out.
ZEROED = (
    "the gradients that their statistics belong to were set to zero before the step. Back-propagate the sum of the "
    "losses, and set gradients of your own, as gradient surgery does, afterwards."
)
UNREACHED = (
    "no recorded loss term reaches them. Likely causes: a penalty on their weights, or a `likelihood` that leaves out "
    "the terms that reach them."
)


class PendingStatistics:
    """Holds the statistics of a step until its refresh.

    A layer is *unseen* while a part of its gradient has no statistics. The statistics of the other parts are dropped,
    since they would not belong to the whole gradient.

    Args:
        layers: The model's layers.
        estimator: The source of the statistics.
        tracker: The dates of each layer.
        group: The ranks between which the batch is split.
        events: Counts statistics that are left out.

    Attributes:
        unseen: The names of unseen layers.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        estimator: Estimator,
        tracker: RefreshTracker,
        group: ProcessGroup,
        events: Events,
    ) -> None:
        self._layers = layers
        self._estimator = estimator
        self._tracker = tracker
        self._group = group
        self._events = events
        self._warned: set[str] = set()
        # Layers whose last statistics were dropped, since their gradient was set to zero.
        self._zeroed: set[str] = set()
        self.unseen: set[str] = set()

    def add(self, statistics: Mapping[str, Statistics]) -> None:
        """Add the statistics of one loss of the step, by layer, without dropped or unseen layers."""
        for name, entry in statistics.items():
            if name in self._layers and name not in self.unseen:
                self._layers[name].add(entry)
                self._zeroed.discard(name)

    def drop(self, names: Iterable[str]) -> None:
        """Drop the statistics of layers whose gradient was thrown away."""
        for name in names:
            if name in self._layers:
                self._layers[name].drop_pending()
            self._estimator.examples.forget(name)
            self._estimator.recount({name})

    def forget(self, names: Iterable[str]) -> None:
        """Drop the statistics of layers until their next step, since a part of their gradient has none."""
        for name in names:
            self.unseen.add(name)
            self.drop([name])

    def skip(self, names: Iterable[str]) -> None:
        """Drop the statistics of layers that made no step; their next gradient has statistics again."""
        for name in names:
            self.drop([name])
            self.unseen.discard(name)

    def leave_out(self, failed: Mapping[str, Exception], step: int) -> None:
        """Drop this step's statistics of layers, on all ranks, and report why.

        Args:
            failed: The error, by layer.
            step: The optimizer step.
        """
        for name in failed:
            if name not in self._layers or name in self.unseen:
                continue
            if self._group.size == 1:
                self.forget([name])
            else:
                # The other ranks wait for this layer; all ranks drop statistics that are not finite.
                self._layers[name].drop_pending()
                self._layers[name].add(_not_finite(self._layers[name]))
                self._estimator.examples.spoil(name)
        for error in dict.fromkeys(failed.values()):
            names = listed(name for name, own in failed.items() if own is error)
            what = f"the statistics of {names} are left out of this step: {type(error).__name__}: {error}"
            self._events.report("failed_statistics", step, what)

    def follow_layers(self, kept: Mapping[str, str]) -> None:
        """Follow a model whose layers have changed.

        Args:
            kept: The present name of each remaining layer, by its former name. Statistics of renamed layers are
                dropped.
        """
        self.drop(now for before, now in kept.items() if before != now)
        self.unseen = {kept[name] for name in self.unseen if name in kept}

    def follow_gradients(self) -> None:
        """Drop the statistics of gradients that were set to zero; forget layers that this forward does not record.

        A generator's loss, for example, leaves a gradient in the discriminator, which is zeroed before any step.
        """
        for name, layer in self._layers.items():
            if (layer.pending is not None or name in self.unseen) and layer.gradient_is_zero():
                self._zeroed.add(name)
                self.skip([name])
        recorded = set(self._estimator.recorded if self._estimator.active else ())
        self.forget(name for name in self._layers if name not in recorded)

    # Gradients without curvature.

    def before_step(self, layers: Iterable[Layer], step: int) -> None:
        """Note layers before their step; warn once about each recorded layer without curvature.

        Args:
            layers: The layers, each of which has a gradient.
            step: The optimizer step.
        """
        idle = [layer.name for layer in layers if self._without_curvature(layer, step)]
        new = [name for name in idle if name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        zeroed = [name for name in new if name in self._zeroed]
        for names, cause in ((zeroed, ZEROED), ([name for name in new if name not in zeroed], UNREACHED)):
            if names and distributed.rank() == 0:
                warnings.warn(
                    f"KFC has no curvature for {', '.join(map(repr, names))}, and their gradients stay unchanged: "
                    f"{cause} Add them to `exclude` to silence this.",
                    stacklevel=3,
                )

    def _without_curvature(self, layer: Layer, step: int) -> bool:
        """Whether a layer was recorded but never had statistics."""
        unseen = layer.name in self.unseen
        self.unseen.discard(layer.name)
        known = self._tracker.has_statistics(layer.name)
        if layer.name not in self._estimator.recorded:
            if known or layer.name not in self._warned:
                self._tracker.missed_its_date(layer.name, step)
            return False
        self._tracker.stop_waiting(layer.name)
        return not (unseen or known or layer.gradient_is_zero())


def _not_finite(layer: Layer) -> Statistics:
    """Statistics of NaN, which all ranks drop."""
    shapes = layer.adapter.factor_shapes()
    nan = torch.tensor(torch.nan, dtype=layer.dtype, device=layer.device)
    means = {name: nan.repeat(shape) for name, shape in shapes.items() if name in layer.adapter.mean_factors}
    return Statistics(means, {name: nan.repeat(shape) for name, shape in shapes.items() if name not in means}, 0)
