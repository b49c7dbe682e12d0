"""Inverses by Cholesky factorisation: of a pair of Kronecker factors, and of small dense blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_kfc.factors.damping import add_diagonal, check_damping, split_damping
from lightning_kfc.factors.inverses.base import FactorisationError, Factors, Inverse
from lightning_kfc.factors.inverses.low_rank import TOLERANCE, FewRows, pays
from lightning_kfc.factors.products import sandwich
from lightning_kfc.factors.statistics import all_finite

#: Attempts at a factorisation: whether in float64, and the factor on the damping. With a factor above 1, the rounding
#: of the matrix is added to its diagonal.
RETRIES = ((False, 1.0), (True, 1.0), (True, 10.0), (True, 100.0), (True, 1000.0))


def _inverse_by_cholesky(matrix: Tensor) -> Tensor | None:
    """The inverse of a symmetric batch; None if it is not positive definite numerically."""
    if not all_finite(matrix):
        return None
    if matrix.ndim == 2:
        if not bool((matrix > 0).all()):
            return None
        inverse = matrix.reciprocal()
    else:
        triangle, info = torch.linalg.cholesky_ex(matrix)
        if bool(info.any()):
            return None
        inverse = torch.cholesky_inverse(triangle)
    return inverse if all_finite(inverse) else None


def _attempt(factor: Tensor, in_double: bool, growth: float) -> Tensor:
    """The factor for one of the ``RETRIES``.

    A singular factor may have slightly negative eigenvalues, by rounding: a few units in the last place of its trace.
    """
    if growth > 1 and factor.ndim == 3:
        trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1)
        return add_diagonal(factor.double(), 16 * torch.finfo(factor.dtype).eps * trace.double())
    return factor.double() if in_double else factor


def _in_precision_of(factor: Tensor, inverse: Tensor | None) -> Tensor | None:
    """The inverse in the factor's precision; None if it overflows there."""
    if inverse is None or inverse.dtype == factor.dtype:
        return inverse
    inverse = inverse.to(factor.dtype)
    return inverse if all_finite(inverse) else None


def _failure(damping: float) -> FactorisationError:
    return FactorisationError(f"no Cholesky factorisation at damping {damping:g} to {damping * RETRIES[-1][1]:g}")


@dataclass(frozen=True)
class CholeskyInverse(Inverse):
    r"""E4 and E5: :math:`V = G_\lambda^{-1} \nabla\bar W A_\lambda^{-1}`, with inverses by Cholesky factorisation.

    The damping is part of the factorisation, so that a new damping takes effect at the next refresh.

    Attributes:
        A_inverse: :math:`A_\lambda^{-1}`, shape ``(groups, d_in, d_in)``, or ``(groups, d_in)`` if diagonal.
        G_inverse: :math:`G_\lambda^{-1}`, shape ``(groups, d_out, d_out)``, or ``(groups, d_out)`` if diagonal.
    """

    A_inverse: Tensor
    G_inverse: Tensor
    name: ClassVar[str] = "cholesky"

    def __post_init__(self) -> None:
        """Store the rows in order, also of a checkpoint's tensors, so that a resumed run rounds alike."""
        object.__setattr__(self, "A_inverse", self.A_inverse.contiguous())
        object.__setattr__(self, "G_inverse", self.G_inverse.contiguous())

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Split the damping by E4 and invert both factors; see :class:`Inverse`."""
        A, G = factors["A"], factors["G"]
        for in_double, growth in RETRIES:
            A_tried, G_tried = _attempt(A, in_double, growth), _attempt(G, in_double, growth)
            A_damped, G_damped = split_damping(A_tried, G_tried, damping * growth)
            A_inverse = _in_precision_of(A, _inverse_by_cholesky(A_damped))
            G_inverse = _in_precision_of(G, _inverse_by_cholesky(G_damped))
            if A_inverse is not None and G_inverse is not None:
                return cls(A_inverse, G_inverse)
        raise _failure(damping)

    def solve(self, gradient: Tensor) -> Tensor:
        """E5; see :class:`Inverse`."""
        return sandwich(self.G_inverse, gradient.to(self.A_inverse.dtype), self.A_inverse).to(gradient.dtype)

    def for_low_rank(self, rows: int | None) -> Inverse:
        """A solve within the gradient's range, for few rows; only on a CPU, where decompositions are cheap."""
        A, G = self.A_inverse, self.G_inverse
        usable = A.ndim == G.ndim == 3 and len(A) == 1 and A.device.type == "cpu" and A.dtype in TOLERANCE
        if rows is None or not usable or not pays(rows, G.shape[-1], A.shape[-1]):
            return self
        return FewRows(A, G, self, rows)

    def in_precision(self, dtype: torch.dtype) -> CholeskyInverse:
        """Both inverses rounded; products with them are computed in that precision. See :class:`Inverse`."""
        if self.A_inverse.dtype == dtype:
            return self
        return CholeskyInverse(self.A_inverse.to(dtype), self.G_inverse.to(dtype))


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
        check_damping(damping)
        F = factors["F"]
        for in_double, growth in RETRIES:
            block = _attempt(F, in_double, growth)
            damped = add_diagonal(block, block.new_full(block.shape[:1], damping * growth))
            inverse = _in_precision_of(F, _inverse_by_cholesky(damped))
            if inverse is not None:
                return cls(inverse)
        raise _failure(damping)

    def solve(self, gradient: Tensor) -> Tensor:
        """See :class:`Inverse`."""
        return (self.F_inverse @ gradient.flatten(1).unsqueeze(-1)).reshape(gradient.shape)
