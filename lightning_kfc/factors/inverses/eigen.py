"""Inverses in the Kronecker-factored eigenbasis: exact damping (E6), and the corrected eigenvalues of EKFAC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_kfc.factors.damping import check_damping
from lightning_kfc.factors.eigenbasis import Eigenbasis, moments_in_basis
from lightning_kfc.factors.inverses.base import FactorisationError, Factors, Inverse
from lightning_kfc.factors.running_average import RunningAverage


def _decompose(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues, at least 0; the vectors of a diagonal are the unit vectors, held as ones.

    Raises:
        FactorisationError: If neither the factor's precision nor float64 gives a finite decomposition.
    """
    if factor.ndim == 2:
        if bool(torch.isfinite(factor).all()):
            return torch.ones_like(factor), factor.clamp(min=0)
    else:
        for dtype in (factor.dtype, torch.float64):
            try:
                values, vectors = torch.linalg.eigh(factor.to(dtype))
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's stubs leave it out
                continue
            values, vectors = values.to(factor.dtype), vectors.to(factor.dtype)
            if bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
                # Rounding makes the zeros of a singular factor slightly negative.
                return vectors, values.clamp(min=0)
    raise FactorisationError(f"no eigendecomposition of a factor of shape {tuple(factor.shape)}")


def _decompose_pair(factors: Factors) -> tuple[Eigenbasis, Tensor]:
    r"""The basis, and :math:`\lambda_G \lambda_A^\top`, shape ``(groups, d_out, d_in)``."""
    A_vectors, A_values = _decompose(factors["A"])
    G_vectors, G_values = _decompose(factors["G"])
    return Eigenbasis(A_vectors, G_vectors), G_values.unsqueeze(-1) * A_values.unsqueeze(-2)


@dataclass(frozen=True)
class EighInverse(Inverse):
    r"""E6: :math:`V = Q_G [(Q_G^\top \nabla\bar W Q_A) \oslash (\lambda_G \lambda_A^\top + \lambda)] Q_A^\top`.

    It is exactly :math:`(A \otimes G + \lambda I)^{-1}`, which E4 approximates. The damping is applied when solving, so
    that a new damping takes effect at once.

    Attributes:
        A_vectors: :math:`Q_A`, shape ``(groups, d_in, d_in)``; ones ``(groups, d_in)`` for a diagonal A.
        G_vectors: :math:`Q_G`, shape ``(groups, d_out, d_out)``; ones ``(groups, d_out)`` for a diagonal G.
        values: :math:`\lambda_G \lambda_A^\top`, not negative, shape ``(groups, d_out, d_in)``.
        damping: :math:`\lambda`.
    """

    A_vectors: Tensor
    G_vectors: Tensor
    values: Tensor
    damping: float
    name: ClassVar[str] = "eigh"

    def __post_init__(self) -> None:
        """Store the rows in order, also of a checkpoint's tensors, so that a resumed run rounds alike."""
        object.__setattr__(self, "A_vectors", self.A_vectors.contiguous())
        object.__setattr__(self, "G_vectors", self.G_vectors.contiguous())

    @property
    def basis(self) -> Eigenbasis:
        """The basis in which the curvature is diagonal."""
        return Eigenbasis(self.A_vectors, self.G_vectors)

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Decompose both factors; see :class:`Inverse`."""
        check_damping(damping)
        basis, values = _decompose_pair(factors)
        return cls(basis.A_vectors, basis.G_vectors, values, damping)

    @classmethod
    def numel(cls, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See :class:`Inverse`; with an eigenvalue for every element of the gradient."""
        groups, d_out = shapes["G"][:2]
        return super().numel(shapes) + groups * d_out * shapes["A"][1]

    def solve(self, gradient: Tensor) -> Tensor:
        """E6; see :class:`Inverse`."""
        basis = self.basis
        return basis.back(basis.project(gradient) / (self.values + self.damping))

    def with_damping(self, damping: float) -> Self:
        """The same decomposition with another damping."""
        return self if damping == self.damping else replace(self, damping=damping)


@dataclass(frozen=True)
class EkfacInverse(EighInverse):
    r"""EKFAC (George et al. 2018, arXiv:1806.03884): the eigenbasis of E6 with corrected eigenvalues.

    ``values`` are the running average of :math:`\sum_n (Q_G^\top \nabla_n Q_A)^{\circ 2}` over the examples'
    gradients. This is the diagonal of the Fisher matrix in the basis, and so the best diagonal in the Frobenius norm.
    Before the first update they are :math:`\lambda_G\lambda_A^\top`.

    Attributes:
        weight: The weight of the running average (:attr:`.RunningAverage.weight`); 0 before the first update.
    """

    weight: float = 0.0
    name: ClassVar[str] = "ekfac"
    wants_examples: ClassVar[bool] = True

    def continuing_from(self, previous: Inverse | None) -> Inverse:
        r"""Transform the previous running average into this basis.

        The previous matrix :math:`Q\,\mathrm{diag}(s)\,Q^\top` has the diagonal
        :math:`R_G^{\circ 2}\, s\, (R_A^{\circ 2})^\top` in the new basis, with R the rotation between the bases.
        """
        if not isinstance(previous, EkfacInverse) or previous.weight == 0 or not self.basis.fits(previous.basis):
            return self
        values = moments_in_basis(previous.values, previous.basis, self.basis)
        return replace(self, values=values, weight=previous.weight)

    def updated(self, moments: Tensor, decay: float) -> Self:
        """Fold a step's second moments, shape ``(groups, d_out, d_in)``, into the running average."""
        average = (
            RunningAverage(self.values, self.weight).updated(moments, decay)
            if self.weight
            else RunningAverage.start(moments, decay)
        )
        return replace(self, values=average.value, weight=average.weight)
