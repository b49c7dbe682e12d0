"""Distribute jobs of known cost evenly."""

from __future__ import annotations

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def factorisation_cost(shapes: Shapes) -> float:
    """The time to factorise a layer, up to a constant: the cube of each factor's dimension, for each group.

    Args:
        shapes: The layer's factors by name, ``(groups, d, d)``, or ``(groups, d)`` for a diagonal.
    """
    return float(sum(s[0] * (s[1] ** 3 if len(s) == 3 else s[1]) for s in shapes.values()))


def longest_first(costs: Mapping[str, float], ranks: int, loads: list[float] | None = None) -> dict[str, int]:
    """Assign each job, the longest first, to the rank with the least load.

    The largest load is at most 4/3 - 1/(3 ranks) of that of the best assignment (Graham 1969).

    Args:
        costs: The jobs' costs by name.
        ranks: The number of ranks.
        loads: The load of each rank, to which the jobs are added.

    Returns:
        The rank of each job; ties are broken by the order of names and ranks, so all ranks get the same result.
    """
    loads = [0.0] * ranks if loads is None else loads
    given = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += costs[name]
        given[name] = rank
    return {name: given[name] for name in costs}
