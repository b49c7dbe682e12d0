"""Loss curves, and what is read off them: time to a target, the best of a grid, medians of ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Reach:
    """What it took to reach a loss: iterations, and seconds of the steps alone. Infinite where it was not reached."""

    iterations: float
    seconds: float


NEVER = Reach(math.inf, math.inf)


@dataclass
class Curve:
    """The training loss after some iterations.

    Attributes:
        iterations: Steps made, growing from 0.
        seconds: What these steps took, evaluation not counted.
        losses: The training loss after them.
    """

    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def append(self, iterations: int, seconds: float, loss: float) -> None:
        """Add a point."""
        self.iterations.append(iterations)
        self.seconds.append(seconds)
        self.losses.append(loss)

    def reach(self, target: float) -> Reach:
        """When the curve is first at or below a loss.

        Between the two points around it the loss is taken to fall geometrically, so that a coarse grid of
        evaluations favours nobody.
        """
        for i, loss in enumerate(self.losses):
            if not loss <= target:
                continue
            if i == 0:
                return Reach(self.iterations[0], self.seconds[0])
            above = self.losses[i - 1]
            share = 1.0 if not math.isfinite(above) else math.log(above / target) / math.log(above / loss)
            return Reach(
                self.iterations[i - 1] + share * (self.iterations[i] - self.iterations[i - 1]),
                self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1]),
            )
        return NEVER

    def diverged(self) -> bool:
        """Whether the last loss is not a number, or more than ten times the first."""
        return bool(self.losses) and not self.losses[-1] <= 10 * self.losses[0]

    def as_dict(self) -> dict[str, list[Any]]:
        """Plain numbers for JSON, rounded to what a measurement can claim."""
        return {
            "iterations": list(self.iterations),
            "seconds": [round(s, 3) for s in self.seconds],
            "losses": [float(f"{loss:.4g}") for loss in self.losses],
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Sequence[Any]]) -> Curve:
        """The reverse of :meth:`as_dict`."""
        return cls(list(entry["iterations"]), list(entry["seconds"]), list(entry["losses"]))


def best_of_grid(curves: Mapping[float, Sequence[Curve]], target: float) -> float:
    """The learning rate whose runs reach the target in the fewest iterations (median over seeds).

    Where none reaches it, the one whose runs end at the lowest loss.

    Args:
        curves: For each learning rate its runs, one a seed.
        target: The loss to reach.
    """

    def score(lr: float) -> tuple[float, float]:
        reached = median(curve.reach(target).iterations for curve in curves[lr])
        ends = [curve.losses[-1] if math.isfinite(curve.losses[-1]) else math.inf for curve in curves[lr]]
        # Runs stop at the target, so that their ends compare only where none got there.
        return reached, median(ends) if math.isinf(reached) else 0.0

    return min(curves, key=score)


def at_edge(lr: float, grid: Sequence[float]) -> bool:
    """Whether a choice lies at the end of its grid, where a better one may lie beyond."""
    return len(grid) > 1 and lr in (min(grid), max(grid))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over seeds of theirs / ours: how many times more they needed; infinite where they never got there.

    Raises:
        ValueError: If the two are not paired.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"ratios need one run of each a seed, got {len(ours)} and {len(theirs)}.")
    ratios = []
    for mine, other in zip(ours, theirs, strict=True):
        if math.isinf(mine):
            ratios.append(math.nan if math.isinf(other) else 0.0)
        else:
            ratios.append(other / mine)
    return math.nan if any(map(math.isnan, ratios)) else median(ratios)
