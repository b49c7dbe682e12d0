"""The magnitude of the loss that trains a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: The least ratio of a loss's magnitudes at two refreshes, for a loss that may be negative and so may come close to 0.
SLOWEST_FALL = 0.5


@dataclass(frozen=True)
class LossMagnitude:
    """The magnitude of a loss at the first and the last refresh; NaN before the first.

    Attributes:
        first: That at the first refresh.
        last: That at the last one.
    """

    first: float = math.nan
    last: float = math.nan

    @property
    def usual(self) -> float:
        """The geometric mean of both."""
        return math.sqrt(self.first) * math.sqrt(self.last)

    def with_loss(self, loss: float, *, never_negative: bool) -> LossMagnitude:
        """The magnitude at one more refresh; the same if the loss is 0 or not finite.

        Args:
            loss: The loss of a step.
            never_negative: Whether the loss is known to be bounded below by 0.
        """
        size = abs(loss)
        if not math.isfinite(size) or size == 0:
            return self
        last = max(size, SLOWEST_FALL * self.last) if math.isfinite(self.last) and not never_negative else size
        return LossMagnitude(last if math.isnan(self.first) else self.first, last)
