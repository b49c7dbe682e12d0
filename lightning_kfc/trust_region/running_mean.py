"""A mean over the last steps, whose weights decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RunningMean:
    """A weighted mean of numbers, one a step. The first numbers count as much as later ones.

    Attributes:
        decay: The factor on the weight of a number with each later one, between 0 and 1.
        total: The weighted sum.
        weight: The sum of the weights; 0 before the first number.
    """

    decay: float
    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """The mean; NaN before the first number."""
        return self.total / self.weight if self.weight else math.nan

    def with_value(self, value: float) -> RunningMean:
        """The mean with one more number."""
        return replace(self, total=self.decay * self.total + value, weight=self.decay * self.weight + 1)

    def state(self) -> list[float]:
        """The sum and its weight."""
        return [self.total, self.weight]

    def loaded(self, state: Sequence[float]) -> RunningMean:
        """The mean with what :meth:`state` returned."""
        total, weight = state
        return replace(self, total=float(total), weight=float(weight))
