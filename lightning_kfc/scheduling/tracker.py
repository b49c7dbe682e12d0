"""Track which layers' statistics and inverses are due at a step.

With several optimizers in turns, such as a generator that steps at every fifth batch, a layer can miss its dates.
Missed refreshes are made up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.scheduling.staggering import StaggeredDates


class RefreshTracker:
    """Holds the steps of each layer's last refreshes of statistics and inverse.

    Args:
        schedule: The dates.
        offsets: The step of the period at which each layer's inverse is due after the warm-up.

    Attributes:
        started_at: The step from which the schedule counts; a restart without statistics has a new warm-up.
    """

    def __init__(self, schedule: RefreshSchedule, offsets: StaggeredDates) -> None:
        self._schedule = schedule
        self._offsets = offsets
        self.started_at = 0
        self._folded: dict[str, int] = {}
        self._factorised: dict[str, tuple[int, float]] = {}
        self._waiting: dict[str, int] = {}
        # The first step of each later layer, which has its own warm-up.
        self._own_starts: dict[str, int] = {}
        self._frozen: set[str] = set()
        self._dates: tuple[int, int, dict[int | None, int]] | None = None

    def statistics_due(self, step: int) -> bool:
        """Whether a step takes the statistics of all layers."""
        return self._schedule.factors_due(step - self.started_at)

    def recorded_at(self, step: int, layers: Iterable[str]) -> list[str]:
        """The layers whose statistics are taken at a step: all layers at a date, else the waiting ones.

        A layer waits for at most one period, since it may not be trained any more. Layers that were found later have
        their own warm-up.
        """
        if self.statistics_due(step):
            return list(layers)
        if not self._waiting and not self._own_starts:
            return []
        period = self._schedule.factor_period(step - self.started_at)
        return [
            name
            for name in layers
            if self._warms_up(name, step) or (name in self._waiting and step - self._waiting[name] <= period)
        ]

    def _warms_up(self, layer: str, step: int) -> bool:
        """Whether a step is in a layer's own warm-up, without its last step."""
        return layer in self._own_starts and step - self._own_starts[layer] < self._schedule.warmup_steps

    def note_frozen(self, layer: str, step: int, *, frozen: bool) -> None:
        """Note whether a layer without statistics is frozen; when it is not any more, its own warm-up begins.

        Else it would step by its plain gradient until the next date.
        """
        if frozen:
            self._frozen.add(layer)
        elif layer in self._frozen:
            self._frozen.discard(layer)
            self._own_starts[layer] = step

    def factors_refreshed(self, layer: str, step: int) -> None:
        """Note that a layer's statistics were folded into its averages."""
        self._folded[layer] = step
        self._waiting.pop(layer, None)

    def has_statistics(self, layer: str) -> bool:
        """Whether a layer's statistics were ever folded."""
        return layer in self._folded

    def ages(self, layer: str, step: int) -> tuple[int | None, int | None]:
        """Steps since the last refresh of a layer's statistics and of its inverse; None without one."""
        folded, inverse = self._folded.get(layer), self._factorised.get(layer)
        return None if folded is None else step - folded, None if inverse is None else step - inverse[0]

    def missed_its_date(self, layer: str, step: int) -> None:
        """Note that a layer was trained unrecorded; if it missed a date, it waits from now on."""
        if self._folded.get(layer, -1) < self._last_dates(step)[0]:
            self._waiting[layer] = step

    def stop_waiting(self, layer: str) -> None:
        """Stop waiting for a layer that was recorded without statistics."""
        self._waiting.pop(layer, None)

    def new_inverse(self, layer: str, step: int) -> bool:
        """Whether a layer's inverse will be refreshed at a step that takes its statistics."""
        if layer not in self._factorised:
            return True
        at, date = self._factorised[layer][0], self._last_inverse_date(layer, step)
        # A layer without new statistics skips its date. Catching up later would invert all skipped layers in one step.
        return at < date and (self._offset(layer, step) is None or at < self._last_factors_before(date))

    def inverse_outdated(self, layer: str, damping: float) -> bool:
        """Whether a refresh would change a layer's inverse, by new statistics or another damping."""
        at, used = self._factorised.get(layer, (-1, None))
        return self._folded.get(layer, -1) > at or damping != used

    def inverse_refreshed(self, layer: str, step: int, damping: float) -> None:
        """Note that a layer's inverse was refreshed, or that the attempt failed."""
        self._factorised[layer] = (step, damping)

    def _last_dates(self, step: int) -> tuple[int, dict[int | None, int]]:
        """The latest steps, up to this one, at which statistics and, by offset, inverses were due.

        Cached, since it is read for every layer at every step.
        """
        if self._dates is None or self._dates[0] != step:
            self._dates = step, self._last_factors_before(step), {}
        return self._dates[1:]

    def _last_factors_before(self, step: int) -> int:
        return self._schedule.last_factors_due(step - self.started_at) + self.started_at

    def _last_inverse_date(self, layer: str, step: int) -> int:
        if self._warms_up(layer, step):
            start = self._own_starts[layer]
            return self._schedule.last_inverses_due(step - start) + start
        offset, (_, dates) = self._offset(layer, step), self._last_dates(step)
        if offset not in dates:
            dates[offset] = self._schedule.last_inverses_due(step - self.started_at, offset) + self.started_at
        return dates[offset]

    def _offset(self, layer: str, step: int) -> int | None:
        # Offsets are assigned after the first step, which drops layers.
        since = step - self.started_at
        if self._warms_up(layer, step):
            return None
        return self._offsets.of(layer) if since >= self._schedule.warmup_steps and since > 0 else None

    def refresh_soon(self, layers: Iterable[str], step: int) -> None:
        """Refresh statistics and inverses of layers at their next step, from this one on."""
        for layer in layers:
            self._waiting[layer] = step
            self._factorised.pop(layer, None)

    def forget(self, layer: str) -> None:
        """Forget the refreshes of a layer that starts anew."""
        self._folded.pop(layer, None)
        self._factorised.pop(layer, None)

    def follow(self, kept: Mapping[str, str], new: Iterable[str], step: int) -> None:
        """Follow a model whose layers have changed.

        Args:
            kept: The present name of each remaining layer, by its former name.
            new: Layers that begin their own warm-up at this step.
            step: The optimizer step.
        """
        self._folded = {kept[name]: at for name, at in self._folded.items() if name in kept}
        self._factorised = {kept[name]: made for name, made in self._factorised.items() if name in kept}
        self._waiting = {kept[name]: at for name, at in self._waiting.items() if name in kept}
        self._frozen = {kept[name] for name in self._frozen if name in kept}
        self._own_starts = {kept[name]: at for name, at in self._own_starts.items() if name in kept}
        self._own_starts |= dict.fromkeys(new, step)
        self._offsets.follow(kept)

    def reschedule(self, schedule: RefreshSchedule) -> None:
        """Use another schedule from now on."""
        self._schedule, self._dates = schedule, None
        self._offsets.clear(schedule)

    def restart(self, step: int) -> None:
        """Start anew: the warm-up begins at this step."""
        self.started_at = step
        self._dates = None
        self._offsets.clear()
        for kept in (self._folded, self._factorised, self._waiting, self._own_starts):
            kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {
            "started_at": self.started_at,
            "folded": dict(self._folded),
            "factorised": {name: [at, damping] for name, (at, damping) in self._factorised.items()},
            "waiting": dict(self._waiting),
            "own_starts": dict(self._own_starts),
            "frozen": sorted(self._frozen),
            "slots": self._offsets.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of :meth:`state_dict`."""
        self.restart(int(state["started_at"]))
        self._folded = {name: int(at) for name, at in state["folded"].items()}
        self._factorised = {name: (int(at), float(damping)) for name, (at, damping) in state["factorised"].items()}
        self._waiting = {name: int(at) for name, at in state["waiting"].items()}
        self._own_starts = {name: int(at) for name, at in state.get("own_starts", {}).items()}
        self._frozen = set(state.get("frozen", ()))
        # States of versions without offsets get new ones.
        self._offsets.load_state_dict(state.get("slots", {}))
