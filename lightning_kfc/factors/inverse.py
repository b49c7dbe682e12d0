"""Damped inverses of the Kronecker-factored Fisher: factorise once in a while, solve at every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_kfc.factors.damping import add_diagonal, split_damping

Factors = Mapping[str, Tensor]


class FactorisationError(ArithmeticError):
    """A factor could not be factorised, at any damping that was tried, in float64."""


class Inverse(ABC):
    """A factorised, damped curvature matrix of one layer.

    A subclass is a frozen dataclass whose fields are tensors and numbers: that is what a checkpoint holds.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Factorise: the rare, dear call.

        Args:
            factors: Factors by name, as :meth:`lightning_kfc.factors.statistics.Statistics.factors` makes them.
            damping: The damping in the units of the Fisher matrix, positive.

        Raises:
            FactorisationError: If no finite inverse was found.
        """

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """Apply the inverse to a gradient of shape ``(groups, d_out, d_in)``: the call made each step."""

    def state(self) -> dict[str, Tensor | float]:
        """The fields, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(value.nbytes for value in self.state().values() if isinstance(value, Tensor))


def _inverse_by_cholesky(matrix: Tensor) -> Tensor | None:
    """The inverse of a symmetric positive definite batch, or None where it is not one numerically."""
    if matrix.ndim == 2:
        inverse = matrix.reciprocal()
    else:
        triangle, info = torch.linalg.cholesky_ex(matrix)
        if bool(info.any()):
            return None
        inverse = torch.cholesky_inverse(triangle)
    return inverse if bool(torch.isfinite(inverse).all()) else None


#: A factor that will not factorise is tried again in float64, then with the damping grown by these ratios.
RETRIES = ((False, 1.0), (True, 1.0), (True, 10.0), (True, 100.0), (True, 1000.0))


@dataclass(frozen=True)
class CholeskyInverse(Inverse):
    r"""E4 and E5: :math:`V = G_\lambda^{-1} \nabla\bar W A_\lambda^{-1}`, inverses taken by Cholesky factorisation.

    Attributes:
        A_inverse: :math:`A_\lambda^{-1}`, shape ``(groups, d_in, d_in)``, or ``(groups, d_in)`` if diagonal.
        G_inverse: :math:`G_\lambda^{-1}`, shape ``(groups, d_out, d_out)``.
    """

    A_inverse: Tensor
    G_inverse: Tensor
    name: ClassVar[str] = "cholesky"

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Split the damping by E4 and invert both factors; see :class:`Inverse`."""
        A, G = factors["A"], factors["G"]
        for in_double, growth in RETRIES:
            A_damped, G_damped = split_damping(
                A.double() if in_double else A, G.double() if in_double else G, damping * growth
            )
            A_inverse, G_inverse = _inverse_by_cholesky(A_damped), _inverse_by_cholesky(G_damped)
            if A_inverse is not None and G_inverse is not None:
                return cls(A_inverse.to(A.dtype), G_inverse.to(G.dtype))
        raise FactorisationError(f"no Cholesky factorisation at damping {damping:g} to {damping * RETRIES[-1][1]:g}")

    def solve(self, gradient: Tensor) -> Tensor:
        """E5; see :class:`Inverse`."""
        return _sandwich(self.G_inverse, gradient, self.A_inverse)


def _sandwich(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """``left @ middle @ right`` per group; a two-axis factor is a diagonal."""
    if middle.shape[0] == 1 and left.ndim == 3 and right.ndim == 3:
        # One group is nearly every layer, and a plain product is faster than a batch of one.
        return (left[0] @ middle[0] @ right[0]).unsqueeze(0)
    half = left @ middle if left.ndim == 3 else left.unsqueeze(-1) * middle
    return half @ right if right.ndim == 3 else half * right.unsqueeze(-2)


@dataclass(frozen=True)
class BlockInverse(Inverse):
    r"""The damped inverse of small dense blocks, one a group: :math:`(F + \lambda I)^{-1}`.

    Attributes:
        F_inverse: Shape ``(groups, d, d)`` with d = d_out * d_in.
    """

    F_inverse: Tensor
    name: ClassVar[str] = "block"

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Invert every block; see :class:`Inverse`."""
        F = factors["F"]
        for in_double, growth in RETRIES:
            block = F.double() if in_double else F
            inverse = _inverse_by_cholesky(add_diagonal(block, block.new_full(block.shape[:1], damping * growth)))
            if inverse is not None:
                return cls(inverse.to(F.dtype))
        raise FactorisationError(f"no Cholesky factorisation at damping {damping:g} to {damping * RETRIES[-1][1]:g}")

    def solve(self, gradient: Tensor) -> Tensor:
        """See :class:`Inverse`."""
        return (self.F_inverse @ gradient.flatten(1).unsqueeze(-1)).reshape(gradient.shape)


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
        inverse = (factors["F"] + damping).reciprocal()
        if not bool(torch.isfinite(inverse).all()):
            raise FactorisationError("the diagonal holds a value that is not finite")
        return cls(inverse)

    def solve(self, gradient: Tensor) -> Tensor:
        """See :class:`Inverse`."""
        return (self.F_inverse * gradient.flatten(1)).reshape(gradient.shape)


#: The inverses a user can name.
INVERSES: dict[str, type[Inverse]] = {CholeskyInverse.name: CholeskyInverse}
