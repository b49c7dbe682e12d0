"""Folds a step's statistics into the factors and refreshes what is made from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_kfc import distributed
from lightning_kfc.due import Due
from lightning_kfc.factors.inverse import INVERSES, FactorisationError
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.layer import Layer
from lightning_kfc.monitor import Events, listed
from lightning_kfc.settings import Settings
from lightning_kfc.step_times import StepTimes


class Refresh:
    """Refreshes factors and inverses of layers, where due.

    Args:
        settings: Decay and the kind of inverse.
        due: When each layer is due; told what was done.
        events: Counts what goes other than planned.
        times: Adds up the time that it takes.
    """

    def __init__(self, settings: Settings, due: Due, events: Events, times: StepTimes) -> None:
        self._settings = settings
        self._due = due
        self._events = events
        self._times = times

    def __call__(self, layers: Sequence[Layer], step: int, damping: float) -> set[str]:
        """Fold pending statistics, then refresh inverses, then fold second moments in the basis of these.

        Args:
            layers: The layers.
            step: The optimizer step.
            damping: In force at this step.

        Returns:
            The names of layers whose pending statistics were dropped.
        """
        with self._times.part("statistics"):
            dropped = self._fold_pending(layers, step)
        with self._times.part("inverses"):
            self._refresh_inverses(layers, step, damping)
        with self._times.part("statistics"):
            self._fold_second_moments(layers, step)
        return dropped

    def _fold_pending(self, layers: Sequence[Layer], step: int) -> set[str]:
        pending = {layer.name: layer.pending for layer in layers if layer.pending is not None}
        by_name = {layer.name: layer for layer in layers}
        for layer in layers:
            layer.pending = None
        unusable: list[str] = []
        empty: list[str] = []
        for name, statistics in distributed.reduce_statistics(pending).items():
            if not statistics.is_finite():
                unusable.append(name)
            elif statistics.means and statistics.rows == 0:
                empty.append(name)
            else:
                if not by_name[name].fold(statistics, self._settings.ema_decay):
                    self._events.count("restarted_layers")
                    self._due.forget(name)
                self._due.folded(name, step)
        if unusable:
            what = f"the statistics of {listed(unusable)} are not finite and are dropped"
            self._events.report("nonfinite_statistics", step, what)
        if empty:
            self._events.report("empty_statistics", step, "a batch without examples is left out of the statistics")
        return {*unusable, *empty}

    def _refresh_inverses(self, layers: Sequence[Layer], step: int, damping: float) -> None:
        for layer in layers:
            if not layer.averages or not self._due.inverse(layer.name, step, damping):
                continue
            self._due.factorised(layer.name, step, damping)
            try:
                layer.factorise(INVERSES[self._settings.inverse], damping, step)
            except FactorisationError as error:
                self._events.count("failed_factorisations")
                kept = "the last good inverse is kept" if layer.inverse is not None else "its plain gradient is used"
                if distributed.rank() == 0:
                    warnings.warn(f"KFC at step {step}, layer {layer.name!r}: {error}; {kept}.", stacklevel=2)

    def _fold_second_moments(self, layers: Sequence[Layer], step: int) -> None:
        by_name = {layer.name: layer for layer in layers}
        moments = {layer.name: layer.take_second_moment() for layer in layers}
        statistics = {name: Statistics({}, {"S": S}, 0) for name, S in moments.items() if S is not None}
        for name, entry in distributed.reduce_statistics(statistics).items():
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
