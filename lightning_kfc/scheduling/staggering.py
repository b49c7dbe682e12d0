"""The offset of each layer within the inverses' period: a pure function of the layers' costs.

If all layers were inverted at the same step, this step would take the time of all of them. So each layer has an
*offset* within the period. The number of offsets is the smallest with which no step exceeds the cost of the most
expensive layer, which cannot be divided. Small layers share offsets, and several ranks factorise them in parallel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.utilities.load_balancing import longest_first


def open_offsets(schedule: RefreshSchedule, *, with_statistics: bool) -> Iterator[int]:
    """The offsets of a schedule, in the order of filling.

    Offsets just after a date of statistics come first, since their factors are the freshest. Offsets at such a date,
    which is expensive anyway, come last.

    Args:
        schedule: The periods. There are no offsets if statistics are rarer than inverses.
        with_statistics: Whether only offsets at dates of statistics are open; there are none if the period of the
            inverses is no multiple of that of the statistics.
    """
    factors, inverses = schedule.factor_every_n_steps, schedule.inverse_every_n_steps
    if inverses < factors or (with_statistics and inverses % factors):
        return iter(())
    ages = [0] if with_statistics else itertools.chain(range(1, factors), [0])
    return (offset for age in ages for offset in range(age, inverses, factors))


def shared_out(costs: Mapping[str, float], offsets: Iterator[int]) -> tuple[list[int], dict[str, int]]:
    """The used offsets, and the offset of each layer.

    Args:
        costs: The layers' costs, by name.
        offsets: The open offsets.
    """
    used = list(itertools.islice(offsets, len(costs)))
    if not used:
        return [], {}
    longest = max(costs.values())
    count = min(len(used), math.ceil(sum(costs.values()) / longest) if longest else 1)
    while True:
        loads = [0.0] * count
        seats = longest_first(costs, count, loads)
        if max(loads) <= longest or count == len(used):
            return used[:count], {name: used[seat] for name, seat in seats.items()}
        count += 1


class StaggeredDates:
    """The offset of each layer; later layers are added to the offsets with the least cost.

    Args:
        schedule: The periods.
        costs: The cost of each present layer, by name; read again for a layer without an offset.
        staggered: Whether layers have different offsets.
        with_statistics: Whether inverses are refreshed only at dates of statistics.
    """

    def __init__(
        self,
        schedule: RefreshSchedule,
        costs: Mapping[str, float],
        *,
        staggered: bool = True,
        with_statistics: bool = False,
    ) -> None:
        self._schedule = schedule
        self._costs = costs
        self._staggered = staggered
        self._with_statistics = with_statistics
        self._used: list[int] = []
        self._given: dict[str, int] = {}
        self.clear()

    def of(self, layer: str) -> int | None:
        """A layer's offset; None without staggering."""
        if not (self._staggered and self._possible):
            return None
        if layer not in self._given:
            self._add(dict(self._costs))
        return self._given.get(layer)

    def _add(self, costs: Mapping[str, float]) -> None:
        if not self._used:
            self._used, self._given = shared_out(costs, self._open())
        loads = [sum(costs.get(n, 0.0) for n, own in self._given.items() if own == offset) for offset in self._used]
        new = {name: cost for name, cost in costs.items() if name not in self._given}
        seats = longest_first(new, len(self._used), loads)
        self._given |= {name: self._used[seat] for name, seat in seats.items()}

    def _open(self) -> Iterator[int]:
        return open_offsets(self._schedule, with_statistics=self._with_statistics)

    def follow(self, kept: Mapping[str, str]) -> None:
        """Keep the offsets of remaining layers, given their present names by their former names."""
        self._given = {kept[name]: offset for name, offset in self._given.items() if name in kept}

    def clear(self, schedule: RefreshSchedule | None = None) -> None:
        """Assign the offsets again, for another schedule if given."""
        self._schedule = schedule or self._schedule
        self._used, self._given = [], {}
        self._possible = next(self._open(), None) is not None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {"used": list(self._used), "given": dict(self._given)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state if the present schedule has its offsets; else assign the offsets again."""
        self.clear()
        used = [int(offset) for offset in state.get("used", [])]
        if used == list(itertools.islice(self._open(), len(used))):
            self._used, self._given = used, {name: int(offset) for name, offset in state.get("given", {}).items()}
