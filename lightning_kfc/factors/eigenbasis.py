r"""The eigenbasis of a pair of Kronecker factors, and second moments of gradients in it.

Q is :math:`Q_A \otimes Q_G`. The vectors of a diagonal factor are the unit vectors, held as ones ``(groups, d)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.factors.products import sandwich, transposed
from lightning_kfc.factors.statistics import per_example_gradients


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal bases of a layer's input and output side.

    Attributes:
        A_vectors: Columns, shape ``(groups, d_in, d_in)``, or ones ``(groups, d_in)``.
        G_vectors: Columns, shape ``(groups, d_out, d_out)``, or ones ``(groups, d_out)``.
    """

    A_vectors: Tensor
    G_vectors: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, d_out, d_in)``."""
        return self.A_vectors.shape[0], self.G_vectors.shape[1], self.A_vectors.shape[1]

    def project(self, gradients: Tensor) -> Tensor:
        r""":math:`Q_G^\top M Q_A` of matrices ``(..., groups, d_out, d_in)``."""
        return sandwich(transposed(self.G_vectors), gradients, self.A_vectors)

    def back(self, projected: Tensor) -> Tensor:
        r""":math:`Q_G M Q_A^\top`, the inverse of :meth:`project`."""
        return sandwich(self.G_vectors, projected, transposed(self.A_vectors))

    def fits(self, other: Eigenbasis) -> bool:
        """Whether both have the same dimensions, and the same sides diagonal."""
        return self.A_vectors.shape == other.A_vectors.shape and self.G_vectors.shape == other.G_vectors.shape

    def same_as(self, other: Eigenbasis) -> bool:
        """Whether it is the very same decomposition."""
        return self.A_vectors is other.A_vectors and self.G_vectors is other.G_vectors


def _in_basis(rows: Tensor, vectors: Tensor) -> Tensor:
    """Rows ``(examples, positions, groups, d)`` as coordinates along the vectors."""
    return torch.einsum("ntgd,gde->ntge", rows, vectors) if vectors.ndim == 3 else rows


def moments_of_rows(input_rows: Tensor, output_rows: Tensor, basis: Eigenbasis) -> Tensor:
    r"""Sum over n of :math:`(Q_G^\top \nabla_n Q_A)^{\circ 2}`, :math:`\nabla_n = \sum_t g_{nt} a_{nt}^\top`.

    Args:
        input_rows: Shape ``(examples, positions, groups, d_in)``.
        output_rows: Shape ``(examples, positions, groups, d_out)``.
        basis: The basis.

    Returns:
        Shape ``(groups, d_out, d_in)``.
    """
    positions = input_rows.shape[1]
    _, d_out, d_in = basis.shape
    if positions == 1:
        # One row per example: the squared outer product is the outer product of squares.
        a, g = _in_basis(input_rows, basis.A_vectors)[:, 0], _in_basis(output_rows, basis.G_vectors)[:, 0]
        return torch.einsum("ngo,ngi->goi", g.square(), a.square())
    if positions * (d_in**2 + d_out**2) < d_out * d_in * (d_out + d_in):
        a, g = _in_basis(input_rows, basis.A_vectors), _in_basis(output_rows, basis.G_vectors)
        return per_example_gradients(a, g).square().sum(0)
    return moments_of_gradients(per_example_gradients(input_rows, output_rows), basis)


def moments_of_gradients(gradients: Tensor, basis: Eigenbasis) -> Tensor:
    """The same from the examples' gradients, shape ``(examples, groups, d_out, d_in)``."""
    return basis.project(gradients).square().sum(0)


def moments_in_basis(moments: Tensor, old: Eigenbasis, new: Eigenbasis) -> Tensor:
    r"""The diagonal, in the new basis, of :math:`Q\,\mathrm{diag}(s)\,Q^\top` with Q the old basis.

    Args:
        moments: s, shape ``(groups, d_out, d_in)``.
        old: The old basis.
        new: The new basis; must fit the old one.
    """
    return sandwich(
        _squared_rotation(old.G_vectors, new.G_vectors),
        moments,
        transposed(_squared_rotation(old.A_vectors, new.A_vectors)),
    )


def _squared_rotation(old: Tensor, new: Tensor) -> Tensor:
    """Squared cosines between new and old vectors, ``(groups, new, old)``; ones ``(groups, d)`` for unit vectors."""
    return (new.mT @ old).square() if new.ndim == 3 else new
