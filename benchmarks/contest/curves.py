"""Loss curves, with the time to a target, the best of a grid, and medians of ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Reach:
    """Iterations, and seconds of the steps alone, to a loss; infinite if it was not reached."""

    iterations: float
    seconds: float


NEVER = Reach(math.inf, math.inf)


class HeldOut(NamedTuple):
    """Loss and accuracy on the held-out examples after some iterations; the accuracy may be missing."""

    iteration: int
    loss: float
    accuracy: float | None


@dataclass
class Curve:
    """The training loss after some iterations.

    Attributes:
        iterations: Steps made, growing from 0.
        seconds: The time of these steps, without evaluation.
        losses: The training loss after these steps.
        held_out: Held-out measurements, at fewer iterations.
    """

    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)

    def append(self, iterations: int, seconds: float, loss: float) -> None:
        """Add a point."""
        self.iterations.append(iterations)
        self.seconds.append(seconds)
        self.losses.append(loss)

    def reach(self, target: float) -> Reach:
        """The first point at or below a loss, interpolated geometrically between evaluations."""
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

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, rounded to the precision of a measurement."""
        return {
            "iterations": list(self.iterations),
            "seconds": [round(s, 3) for s in self.seconds],
            "losses": [_four_digits(loss) for loss in self.losses],
            "held_out": {
                "iterations": [point.iteration for point in self.held_out],
                "losses": [_four_digits(point.loss) for point in self.held_out],
                "accuracies": [None if point.accuracy is None else round(point.accuracy, 4) for point in self.held_out],
            },
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Curve:
        """The inverse of :meth:`as_dict`."""
        held_out = entry["held_out"]
        points = zip(held_out["iterations"], held_out["losses"], held_out["accuracies"], strict=True)
        return cls(entry["iterations"], entry["seconds"], entry["losses"], [HeldOut(*point) for point in points])

    def held_out_at(self, target: float) -> HeldOut | None:
        """The held-out measurement at the first point at or below a loss; None if there is none."""
        reached = next((i for i, loss in zip(self.iterations, self.losses, strict=True) if loss <= target), None)
        return next((point for point in self.held_out if point.iteration == reached), None)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def at_edge(lr: float, grid: Sequence[float]) -> bool:
    """Whether a choice is at the edge of its grid, so that a better one may lie outside."""
    return len(grid) > 1 and lr in (min(grid), max(grid))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over seeds of theirs / ours; infinite if they did not reach the loss.

    Raises:
        ValueError: If the numbers of seeds differ.
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
