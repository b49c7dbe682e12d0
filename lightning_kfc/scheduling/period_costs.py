"""Periods that keep the overhead within a budget: a pure function of the costs of a step's phases.

Of the pairs of periods that do, the one with the youngest curvature: an inverse in use is T_inv / 2 steps old in the
mean, and the statistics that it was made from T_cov / 2 more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: T_cov and T_inv are chosen between these. Shorter ones leave the running averages, at the default decay, a memory of
#: too few steps; with longer ones they hold statistics of a network that is no longer there.
SHORTEST, LONGEST = (5, 10), (50, 200)


@dataclass(frozen=True)
class Costs:
    """The costs of a step, in seconds.

    Attributes:
        plain: A step without the callback.
        each_step: Costs of each step for any periods: preconditioning, and reviews in the mean.
        statistics: Taking statistics once.
        inverses: Refreshing all inverses once.
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
    """A choice.

    Attributes:
        factors: T_cov, in steps.
        inverses: T_inv, in steps.
        overhead: The mean overhead with them, as a share of a plain step.
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
        factors: T_cov where it is given.
        inverses: T_inv where it is given.
    """
    if factors is not None and inverses is not None:
        yield factors, inverses
        return
    if inverses is not None:
        # With rarer statistics most inverses would not change.
        yield from ((t, inverses) for t in range(min(SHORTEST[0], inverses), min(LONGEST[0], inverses) + 1))
        return
    for t in (factors,) if factors is not None else range(SHORTEST[0], LONGEST[0] + 1):
        shortest = -(-SHORTEST[1] // t) * t
        yield from ((t, inverse) for inverse in range(shortest, max(LONGEST[1], shortest) + 1, t))
