"""Folds a step's statistics into the factors and refreshes what is made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.factor_reduction import Outline, Reduced, Reduction
from lightning_kfc.distributed.process_group import Team
from lightning_kfc.factors.inverses import EkfacInverse
from lightning_kfc.factors.statistics import Statistics, factor_dtype
from lightning_kfc.monitoring.events import Events, listed
from lightning_kfc.monitoring.timing import StepTimes
from lightning_kfc.refresh.inverses import Inverting
from lightning_kfc.scheduling.tracker import Due
from lightning_kfc.settings import Settings


class Refresh:
    """Refreshes factors and inverses of layers, where due.

    Args:
        settings: Decay and the kind of inverse.
        due: When each layer is due; told what was done.
        events: Counts what goes other than planned.
        team: The ranks between which the batch is split.
        ownership: Knows which of them holds what.
        give_up: Called with the names of layers and the reason why the rows of each do not explain its gradient, once
            all ranks know.
        times: Adds up the time that it takes.

    Attributes:
        communication: What the ranks have sent each other.
    """

    def __init__(
        self,
        settings: Settings,
        due: Due,
        events: Events,
        team: Team,
        ownership: LayerOwnership,
        give_up: Callable[[Mapping[str, str]], None],
        times: StepTimes,
    ) -> None:
        self._settings = settings
        self._due = due
        self._events = events
        self._team = team
        self._ownership = ownership
        self._give_up = give_up
        self._times = times
        self._expected: set[str] = set()
        self._given_up: dict[str, str] = {}
        self._begun: tuple[list[Layer], Reduction] | None = None
        self._asked: list[Layer] = []
        self.communication = ownership.communication
        self._inverting = Inverting(settings, due, events, ownership)

    # What all ranks must know of each other before they fold.

    def expect(self, layers: Iterable[str]) -> None:
        """Note that statistics of these layers may have been found on some rank: all ranks will ask for them."""
        self._expected.update(layers)

    def expects(self, layers: Iterable[str]) -> bool:
        """Whether statistics of any of these layers may wait, on this rank or on another one."""
        return self._begun is not None or not self._expected.isdisjoint(layers)

    def exchanges(self, layers: Iterable[str], step: int, damping: float) -> bool:
        """Whether a refresh of these layers at this step sends anything between ranks."""
        layers = list(layers)
        return self.expects(layers) or self._inverting.sends(layers, step, damping)

    def give_up_together(self, layer: str, reason: str) -> None:
        """Have all ranks give a layer up with the next statistics, though only this one may have the reason."""
        self._given_up[layer] = reason

    def begin(self, layers: Sequence[Layer]) -> None:
        """Begin to add up what the layers have over the ranks; the next refresh of them waits for it."""
        if self._team.size == 1 or self._begun is not None:
            return
        expected = [layer for layer in layers if layer.name in self._expected]
        self._expected.difference_update(layer.name for layer in expected)
        asked = [layer for layer in expected if layer.pending is not None or layer.adapter.own_parameters()]
        if asked:
            self._begun = asked, self._reduction_of(asked)

    def discard(self, layers: Iterable[str]) -> None:
        """Ask no more for the statistics of layers, which the caller drops."""
        if self._begun is not None:
            # What other ranks send must be received, or it would be taken for the next message.
            self._begun[1].end()
            self._begun = None
        self._expected.difference_update(layers)

    def follow(self, kept: Mapping[str, str]) -> None:
        """Follow a model whose layers have changed.

        Args:
            kept: The present name of each layer that stays, by the name that it had. Statistics that wait under another
                name are asked for no more.
        """
        self.discard([name for name in self._expected if kept.get(name) != name])
        self._given_up = {kept[name]: reason for name, reason in self._given_up.items() if name in kept}

    def abandon(self) -> None:
        """Forget a sum that is still on its way, as an exception has left it."""
        self._begun = None

    def __call__(self, layers: Sequence[Layer], step: int, damping: float) -> set[str]:
        """Fold pending statistics, then refresh inverses.

        Args:
            layers: The layers.
            step: The optimizer step.
            damping: In force at this step.

        Returns:
            The names of layers whose pending statistics were dropped.
        """
        self._asked = []
        with self._times.part("statistics"):
            dropped = self._fold_pending(layers, step)
        with self._times.part("inverses"):
            self._inverting(layers, step, damping)
        return dropped

    # Statistics.

    def _fold_pending(self, layers: Sequence[Layer], step: int) -> set[str]:
        found = self._pending_of_all_ranks(layers)
        by_name = {layer.name: layer for layer in (*layers, *self._asked)}
        finite = self._finite_on_their_owners(found)
        unusable: list[str] = []
        empty: list[str] = []
        for name in list(found):
            layer, reduced = by_name[name], found[name]
            layer.pending = None
            statistics = reduced.statistics
            # Let go of each when it is folded: together they are as large as all factors.
            found[name] = replace(reduced, statistics=None)
            if reduced.present == 0:
                continue
            if not finite[name]:
                unusable.append(name)
            elif reduced.rows == 0 and layer.adapter.mean_factors.intersection(layer.adapter.factor_shapes()):
                empty.append(name)
            else:
                decay = self._settings.ema_decay
                layer.rows = max(layer.rows or 0, int(reduced.rows)) or None
                if not (layer.fold(statistics, decay) if statistics is not None else layer.fold_elsewhere()):
                    self._events.count("restarted_layers")
                    self._due.forget(name)
                self._due.folded(name, step)
        self._expected.difference_update(by_name)
        self._give_up_flagged(found, by_name)
        if unusable:
            what = f"the statistics of {listed(unusable)} are not finite and are dropped"
            self._events.report("nonfinite_statistics", step, what)
        if empty:
            self._events.report("empty_statistics", step, "a batch without examples is left out of the statistics")
        return {*unusable, *empty}

    def _finite_on_their_owners(self, found: Mapping[str, Reduced]) -> dict[str, bool]:
        """Whether each sum is finite, which only the ranks that keep it can see."""
        kept = {name: reduced.statistics for name, reduced in found.items()}
        finite = {name: total is None or total.is_finite() for name, total in kept.items()}
        if self._team.size == 1 or self._ownership.replicated or not found:
            return finite
        device = next(iter(self._asked[0].adapter.parameters().values())).device
        told = self._team.largest(torch.tensor([float(not ok) for ok in finite.values()], device=device)).tolist()
        return {name: not flag for name, flag in zip(finite, told, strict=True)}

    def _pending_of_all_ranks(self, layers: Sequence[Layer]) -> dict[str, Reduced]:
        if self._team.size == 1:
            pending = {layer.name: layer.pending for layer in layers if layer.pending is not None}
            return {name: Reduced(1, statistics.rows, False, statistics) for name, statistics in pending.items()}
        found: dict[str, Reduced] = {}
        self.begin(layers)
        # Once more where what was begun before the backward was not of all these layers.
        while self._begun is not None:
            if not found:
                self.communication.begin("factors")
            asked, reduction = self._begun
            self._begun = None
            self._asked += asked
            self.communication.add("factors", reduction.bytes)
            found |= reduction.end()
            self.begin(layers)
        return found

    def _reduction_of(self, asked: Sequence[Layer]) -> Reduction:
        pending = {layer.name: layer.pending for layer in asked if layer.pending is not None}
        for layer in asked:
            if layer.pending is None:
                layer.note_roles()
        outlines = [_outline(layer, self._ownership.owner(layer)) for layer in asked]
        return Reduction(self._team, outlines, pending, self._given_up, self._settings.reduce_precision)

    def _give_up_flagged(self, found: Mapping[str, Reduced], layers: Mapping[str, Layer]) -> None:
        flagged = [name for name, reduced in found.items() if reduced.flagged]
        if flagged:
            self._give_up({name: self._given_up.pop(name, layers[name].adapter.unseen) for name in flagged})

    # Second moments.

    def fold_second_moments(self, layers: Sequence[Layer], step: int, moments: Mapping[str, Tensor]) -> None:
        """Fold the second moments of examples' gradients (EKFAC), after the refresh of the same layers.

        Args:
            layers: The layers.
            step: The optimizer step.
            moments: By layer, in the present basis.
        """
        by_name = {layer.name: layer for layer in layers}
        found = {name: Statistics({}, {"S": S}, 0) for name, S in moments.items()}
        for name, entry in self._moments_of_all_ranks(found).items():
            if entry.is_finite():
                by_name[name].fold_second_moment(entry.sums["S"], self._settings.ema_decay)
                continue
            self._events.report(
                "missing_second_moments",
                step,
                f"inverse='ekfac' has no gradients of single examples for {name!r} and goes on with the eigenvalues it "
                "has: they are not finite, or the layer's input was changed in place after its forward. Make that "
                "operation out of place, or use inverse='eigh'",
            )

    def _moments_of_all_ranks(self, found: dict[str, Statistics]) -> dict[str, Statistics]:
        if self._team.size == 1:
            return found
        asked = [layer for layer in self._asked if isinstance(layer.inverse, EkfacInverse)]
        if not asked:
            return {}
        outlines = []
        for layer in asked:
            assert isinstance(layer.inverse, EkfacInverse)
            outline = _outline(layer)
            outlines.append(replace(outline, shapes={"S": layer.inverse.basis.shape}, symmetric=False))
        reduction = Reduction(self._team, outlines, found, (), self._settings.reduce_precision)
        self.communication.add("factors", reduction.bytes)
        sums = {name: reduced.statistics for name, reduced in reduction.end().items()}
        return {name: statistics for name, statistics in sums.items() if statistics is not None}


def _outline(layer: Layer, owner: int | None = None) -> Outline:
    parameter = next(iter(layer.adapter.parameters().values()))
    shapes: dict[str, tuple[int, ...]] = layer.adapter.factor_shapes()
    if layer.pending is not None:
        shapes = {name: tuple(t.shape) for name, t in {**layer.pending.means, **layer.pending.sums}.items()}
    return Outline(
        layer.name, shapes, layer.adapter.mean_factors, factor_dtype(parameter.dtype), parameter.device, owner
    )
