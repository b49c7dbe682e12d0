"""Stand-ins for inverses that this rank does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lightning_kfc.factors.inverses import Factors, Inverse, StepInverse


@dataclass(frozen=True)
class RemoteInverse(Inverse):
    """An inverse that another rank holds; only that rank computes updates with it."""

    name: ClassVar[str] = "elsewhere"

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """The stand-in, without factors; see :class:`Inverse`."""
        return cls()

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
    name: ClassVar[str] = "solved"

    def solve(self, gradient: Tensor) -> Tensor:
        """The received update."""
        return self.update
