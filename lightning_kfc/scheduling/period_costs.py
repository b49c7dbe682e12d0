"""Periods that keep the overhead within a budget: a pure function of the costs of a step's phases.

Among the pairs within the budget, the one with the youngest curvature is chosen: the mean age of an inverse in use is
T_inv / 2 steps, and its statistics are T_cov / 2 steps older.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: The bounds of T_cov and T_inv. With shorter periods and the default decay, running averages hold too few steps; with
#: longer ones they hold statistics of former weights.
SHORTEST, LONGEST = (5, 10), (50, 200)


@dataclass(frozen=True)
class Costs:
    """The costs of a step, in seconds.

    Attributes:
        plain: The time of a step without the callback.
        each_step: The costs of every step: preconditioning, and reviews in the mean.
        statistics: The cost to take statistics once.
        inverses: The cost to refresh all inverses once.
    """

    plain: float
    each_step: float
    statistics: float
    inverses: float

    def overhead(self, factors: int, inverses: int) -> float:
        """The mean overhead as a share of a plain step, at two periods in steps."""
        return (self.each_step + self.statistics / factors + self.inverses / inverses) / self.plain


@dataclass(frozen=True)
class Periods:
    """The chosen periods.

    Attributes:
        factors: T_cov, in steps.
        inverses: T_inv, in steps.
        overhead: The mean overhead, as a share of a plain step.
    """

    factors: int
    inverses: int
    overhead: float


def choose_periods(
    costs: Costs, max_overhead: float, factors: int | None = None, inverses: int | None = None
) -> Periods:
    """The shortest periods with an overhead within a budget, or the longest ones if there are none.

    Args:
        costs: The measured costs.
        max_overhead: The budget, as a share of a plain step.
        factors: T_cov; None to choose it.
        inverses: T_inv; None to choose it.
    """
    pairs = list(candidates(factors, inverses))
    within = [pair for pair in pairs if costs.overhead(*pair) <= max_overhead]
    best = min(within, key=lambda pair: (sum(pair), pair)) if within else max(pairs, key=lambda pair: (sum(pair), pair))
    return Periods(*best, costs.overhead(*best))


def candidates(factors: int | None = None, inverses: int | None = None) -> Iterator[tuple[int, int]]:
    """Pairs T_cov, T_inv to choose from; if both are free, T_inv is a multiple of T_cov.

    Args:
        factors: T_cov if given.
        inverses: T_inv if given.
    """
    if factors is not None and inverses is not None:
        yield factors, inverses
        return
    if inverses is not None:
        # With rarer statistics, most refreshes would not change the inverses.
        yield from ((t, inverses) for t in range(min(SHORTEST[0], inverses), min(LONGEST[0], inverses) + 1))
        return
    for t in (factors,) if factors is not None else range(SHORTEST[0], LONGEST[0] + 1):
        shortest = -(-SHORTEST[1] // t) * t
        yield from ((t, inverse) for inverse in range(shortest, max(LONGEST[1], shortest) + 1, t))
