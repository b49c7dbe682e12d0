"""What an inverse was made from, kept as a sketch for as long as the inverse is in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_kfc.factors.running import RunningAverage
from lightning_kfc.factors.sketch import largest_change, sketch
from lightning_kfc.factors.stored import StoredAverage


@dataclass(frozen=True)
class Origin:
    """Enough of what an inverse was made from to tell how far its layer has moved since.

    Attributes:
        damping: That of its time.
        sketches: Of the factors that were inverted, by name; see :mod:`lightning_kfc.factors.sketch`.
    """

    damping: float
    sketches: Mapping[str, Tensor]

    @classmethod
    def of(cls, factors: Mapping[str, Tensor], damping: float) -> Self:
        """What is kept of factors."""
        return cls(damping, {name: sketch(factor) for name, factor in factors.items()})

    def change_to(self, later: Origin, *, of_damping: bool) -> float:
        """The largest relative change of a factor, or of the damping; NaN where a number is not finite.

        Args:
            later: What an inverse would be made from now.
            of_damping: Whether the damping is part of the inverse.
        """
        change = largest_change(later.sketches, self.sketches)
        if not of_damping:
            return change
        # torch keeps a NaN that Python's max() may lose.
        of_both = torch.tensor([change, abs(later.damping - self.damping) / self.damping], dtype=torch.float64)
        return float(of_both.max())

    @property
    def nbytes(self) -> int:
        """Bytes held by the sketches."""
        return sum(value.nbytes for value in self.sketches.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and a number."""
        return {"damping": self.damping, "sketches": dict(self.sketches)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """What :meth:`state_dict` gave."""
        return cls(float(state["damping"]), {name: value.to(device) for name, value in state["sketches"].items()})


def average_state(averages: Mapping[str, StoredAverage]) -> dict[str, dict[str, Any]]:
    """Running factors in plain tensors and numbers."""
    return {name: {"value": a.value, "weight": a.weight, "squares": a.squares} for name, a in averages.items()}


def averages_of(state: Mapping[str, Any], device: torch.device, storage: str) -> dict[str, StoredAverage]:
    """Running factors from what :func:`average_state` gave."""
    return {
        name: StoredAverage.of(
            RunningAverage(entry["value"].to(device), float(entry["weight"]), float(entry["squares"])), storage
        )
        for name, entry in state.items()
    }
