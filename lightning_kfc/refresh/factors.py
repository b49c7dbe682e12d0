"""Sum a step's statistics over ranks and fold them into the running factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.factor_reduction import FactorReduction, ReducedStatistics, StatisticsLayout
from lightning_kfc.factors.inverses import EkfacInverse
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.monitoring.events import Events, listed
from lightning_kfc.scheduling.tracker import RefreshTracker


@dataclass(frozen=True)
class FoldedStatistics:
    """The outcome of a refresh of factors.

    Attributes:
        unusable: The layers whose pending statistics were dropped.
        given_up: Layers to drop on all ranks, with the reason why their rows do not explain their gradient.
    """

    unusable: AbstractSet[str]
    given_up: Mapping[str, str]


class FactorRefresh:
    """Sums pending statistics over ranks and folds them into the running factors.

    Args:
        ema_decay: The decay of the running averages.
        tracker: The dates of each layer.
        events: Counts irregular events.
        ownership: The ranks that hold factors and inverses.
    """

    def __init__(
        self,
        ema_decay: float,
        tracker: RefreshTracker,
        events: Events,
        ownership: LayerOwnership,
    ) -> None:
        self._decay = ema_decay
        self._tracker = tracker
        self._events = events
        self._ownership = ownership
        self._group = ownership.group
        self._communication = ownership.communication
        self._expected: set[str] = set()
        self._given_up: dict[str, str] = {}
        self._begun: tuple[list[Layer], FactorReduction] | None = None
        self._summed: list[Layer] = []

    # Before the fold.

    def expect(self, layers: Iterable[str]) -> None:
        """Expect statistics of these layers from any rank."""
        self._expected.update(layers)

    def expects(self, layers: Iterable[str]) -> bool:
        """Whether statistics of any of these layers may wait on any rank."""
        return self._begun is not None or not self._expected.isdisjoint(layers)

    def give_up_together(self, reasons: Mapping[str, str]) -> None:
        """Drop layers on all ranks with the next statistics, for reasons that may exist only on this rank."""
        self._given_up.update(reasons)

    def begin(self, layers: Sequence[Layer]) -> None:
        """Begin the sum of the layers' statistics over ranks; the next refresh waits for the sum."""
        if self._group.size == 1 or self._begun is not None:
            return
        expected = [layer for layer in layers if layer.name in self._expected]
        self._expected.difference_update(layer.name for layer in expected)
        requested = [layer for layer in expected if layer.pending is not None or layer.adapter.own_parameters()]
        if requested:
            self._begun = requested, self._reduction_of(requested)

    def discard(self, layers: Iterable[str]) -> None:
        """Expect no statistics of these layers; the caller drops them."""
        if self._begun is not None:
            # Messages of other ranks must be received, else they would pass for the next ones.
            self._begun[1].end()
            self._begun = None
        self._expected.difference_update(layers)

    def follow(self, kept: Mapping[str, str]) -> None:
        """Follow a model whose layers have changed.

        Args:
            kept: The present name of each remaining layer, by its former name. Statistics under other names are
                dropped.
        """
        self.discard([name for name in self._expected if kept.get(name) != name])
        self._given_up = {kept[name]: reason for name, reason in self._given_up.items() if name in kept}

    def state_dict(self) -> dict[str, Any]:
        """The layers of an optimizer that has not stepped since their last statistics."""
        return {"expected": sorted(self._expected)} if self._expected else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`."""
        self._expected = set(state.get("expected", ()))

    def abandon(self) -> None:
        """Forget an unfinished sum, after an exception."""
        self._begun = None

    def __call__(self, layers: Sequence[Layer], step: int) -> FoldedStatistics:
        """Fold the pending statistics of layers."""
        self._summed = []
        found = self._pending_of_all_ranks(layers)
        by_name = {layer.name: layer for layer in (*layers, *self._summed)}
        finite = self._finite_on_their_owners(found)
        unusable: list[str] = []
        empty: list[str] = []
        for name in list(found):
            layer, reduced = by_name[name], found[name]
            layer.drop_pending()
            statistics = reduced.statistics
            # Released one by one, since together they are as large as all factors.
            found[name] = replace(reduced, statistics=None)
            if reduced.present == 0:
                continue
            if not finite[name]:
                unusable.append(name)
            elif reduced.rows == 0 and layer.adapter.mean_factors.intersection(layer.adapter.factor_shapes()):
                empty.append(name)
            else:
                layer.seen_rows(int(reduced.rows))
                if not (layer.fold(statistics, self._decay) if statistics is not None else layer.fold_elsewhere()):
                    self._events.count("restarted_layers")
                    self._tracker.forget(name)
                self._tracker.factors_refreshed(name, step)
        self._expected.difference_update(by_name)
        if unusable:
            what = f"the statistics of {listed(unusable)} are not finite and are dropped"
            self._events.report("nonfinite_statistics", step, what)
        if empty:
            self._events.report("empty_statistics", step, "a batch without examples is left out of the statistics")
        return FoldedStatistics({*unusable, *empty}, self._flagged(found, by_name))

    def _finite_on_their_owners(self, found: Mapping[str, ReducedStatistics]) -> dict[str, bool]:
        """Whether each sum is finite, from the ranks that hold it."""
        kept = {name: reduced.statistics for name, reduced in found.items()}
        finite = {name: total is None or total.is_finite() for name, total in kept.items()}
        if self._group.size == 1 or self._ownership.replicated or not found:
            return finite
        flags = torch.tensor([float(not ok) for ok in finite.values()], device=self._summed[0].device)
        bad = self._group.max(flags).tolist()
        return {name: not flag for name, flag in zip(finite, bad, strict=True)}

    def _pending_of_all_ranks(self, layers: Sequence[Layer]) -> dict[str, ReducedStatistics]:
        if self._group.size == 1:
            pending = {layer.name: layer.pending for layer in layers if layer.pending is not None}
            return {
                name: ReducedStatistics(1, statistics.rows, False, statistics) for name, statistics in pending.items()
            }
        found: dict[str, ReducedStatistics] = {}
        self.begin(layers)
        # A second sum, if the one from before the backward did not include all these layers.
        while self._begun is not None:
            if not found:
                self._communication.begin("factors")
            requested, reduction = self._begun
            self._begun = None
            self._summed += requested
            self._communication.add("factors", reduction.bytes)
            found |= reduction.end()
            self.begin(layers)
        return found

    def _reduction_of(self, requested: Sequence[Layer]) -> FactorReduction:
        pending = {layer.name: layer.pending for layer in requested if layer.pending is not None}
        for layer in requested:
            if layer.pending is None:
                layer.note_roles()
        outlines = [_outline(layer, self._ownership.owner(layer)) for layer in requested]
        return FactorReduction(self._group, outlines, pending, self._given_up)

    def _flagged(self, found: Mapping[str, ReducedStatistics], layers: Mapping[str, Layer]) -> dict[str, str]:
        flagged = [name for name, reduced in found.items() if reduced.flagged]
        return {name: self._given_up.pop(name, layers[name].adapter.unseen) for name in flagged}

    # Second moments.

    def fold_second_moments(self, layers: Sequence[Layer], step: int, moments: Mapping[str, Tensor]) -> None:
        """Fold the second moments of examples' gradients (EKFAC), after the refresh of the same layers.

        Args:
            layers: The layers.
            step: The optimizer step.
            moments: The second moments in the present basis, by layer.
        """
        by_name = {layer.name: layer for layer in layers}
        found = {name: Statistics({}, {"S": S}, 0) for name, S in moments.items()}
        for name, entry in self._moments_of_all_ranks(found).items():
            if entry.is_finite():
                by_name[name].fold_second_moment(entry.sums["S"], self._decay)
                continue
            self._events.report(
                "missing_second_moments",
                step,
                f"inverse='ekfac' keeps the old eigenvalues of {name!r}: the gradients of single examples are not "
                "finite, or the layer's input was changed in place after its forward. Make that operation out of "
                "place, or use inverse='eigh'",
            )

    def _moments_of_all_ranks(self, found: dict[str, Statistics]) -> dict[str, Statistics]:
        if self._group.size == 1:
            return found
        requested = [layer for layer in self._summed if isinstance(layer.inverse, EkfacInverse)]
        if not requested:
            return {}
        outlines = []
        for layer in requested:
            assert isinstance(layer.inverse, EkfacInverse)
            outline = _outline(layer)
            outlines.append(replace(outline, shapes={"S": layer.inverse.basis.shape}, symmetric=False))
        reduction = FactorReduction(self._group, outlines, found)
        self._communication.add("factors", reduction.bytes)
        sums = {name: reduced.statistics for name, reduced in reduction.end().items()}
        return {name: statistics for name, statistics in sums.items() if statistics is not None}


def _outline(layer: Layer, owner: int | None = None) -> StatisticsLayout:
    shapes: dict[str, tuple[int, ...]] = layer.adapter.factor_shapes()
    if layer.pending is not None:
        shapes = {name: tuple(t.shape) for name, t in {**layer.pending.means, **layer.pending.sums}.items()}
    return StatisticsLayout(layer.name, shapes, layer.adapter.mean_factors, layer.dtype, layer.device, owner)
