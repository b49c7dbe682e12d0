"""Stand-ins for inverses that this rank does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_kfc.factors.inverses import StepInverse


@dataclass(frozen=True)
class RemoteInverse(StepInverse):
    """An inverse that another rank holds; only that rank computes updates with it."""

    name: ClassVar[str] = "elsewhere"

    def solve(self, gradient: Tensor) -> Tensor:
        """Raise an error, since this rank has no inverse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("Another rank holds this inverse: with placement='mem-opt' its owner computes the updates.")


@dataclass(frozen=True)
class ReceivedUpdate(StepInverse):
    """The preconditioned gradient that another rank computed for this step.

    Attributes:
        update: The preconditioned gradient.
    """

    update: Tensor

    def solve(self, gradient: Tensor) -> Tensor:
        """The received update."""
        return self.update
