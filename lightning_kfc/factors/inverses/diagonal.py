"""The inverse of a diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_kfc.factors.damping import check_damping
from lightning_kfc.factors.inverses.base import FactorisationError, Factors, Inverse


@dataclass(frozen=True)
class DiagonalInverse(Inverse):
    r"""The damped inverse of a diagonal: :math:`1 / (f + \lambda)`.

    Attributes:
        F_inverse: Shape ``(groups, d)`` with d = d_out * d_in.
    """

    F_inverse: Tensor
    name: ClassVar[str] = "diagonal"

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Take reciprocals; see :class:`Inverse`."""
        check_damping(damping)
        damped = factors["F"] + damping
        if not bool((torch.isfinite(damped) & (damped > 0)).all()):
            raise FactorisationError("the diagonal holds a value that is not finite, or negative")
        return cls(damped.reciprocal())

    def solve(self, gradient: Tensor) -> Tensor:
        """See :class:`Inverse`."""
        return (self.F_inverse * gradient.flatten(1)).reshape(gradient.shape)
