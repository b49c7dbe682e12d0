"""The damping of one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_kfc.factors.damping import within_curvature

#: The largest change of weights by one update, as a multiple of their size at the start of training, in the sum over
#: the layers whose damping was lowered.
LARGEST_CHANGE = 2.0


@dataclass(frozen=True)
class OwnDamping:
    """The automatic damping of a layer at the last refresh of its inverse. With the user's damping, all are unset.

    Attributes:
        mean_square: The mean square of the layer's weights at the start of training.
        automatic: The automatic damping; None before the first inverse.
        lowered: Whether the curvature has lowered it.
    """

    mean_square: float | None = None
    automatic: float | None = None
    lowered: bool = False

    def of(self, damping: float) -> float:
        """The damping in force, given the user's, or the automatic one for weights of mean square 1."""
        if self.mean_square is None:
            return damping
        return damping / self.mean_square if self.automatic is None else self.automatic

    def limited(self, damping: float, noise_damping: float, curvature: Mapping[str, Tensor]) -> OwnDamping:
        """The damping at a refresh.

        Args:
            damping: The user's damping, or the automatic one for weights of mean square 1.
            noise_damping: The least automatic damping against noise, for weights of mean square 1.
            curvature: The layer's factors.
        """
        if self.mean_square is None:
            return self
        wanted = damping / self.mean_square
        found = within_curvature(wanted, noise_damping / self.mean_square, curvature)
        return replace(self, automatic=found, lowered=found < wanted)

    @property
    def largest_change(self) -> float:
        """The largest root mean square of a change of the weights; infinite unless the damping was lowered.

        Such a curvature may be about to grow by orders of magnitude, as behind weights of nearly 0.
        """
        if not self.lowered or self.mean_square is None:
            return math.inf
        return LARGEST_CHANGE * math.sqrt(self.mean_square)
