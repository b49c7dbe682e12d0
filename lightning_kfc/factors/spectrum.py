r"""Largest eigenvalues and effective ranks of factors, without a decomposition.

The largest eigenvalue comes from :data:`LANCZOS_STEPS` steps of Lanczos' method, whose estimate is never too large and
converges first at the ends of a spectrum (Golub & Van Loan, 4th ed., ch. 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LANCZOS_STEPS = 10
#: Matrices of the same shape, up to this size, are batched: many small calls take long.
LARGEST_BATCHED = 512


def effective_rank(factor: Tensor) -> Tensor:
    r""":math:`(\operatorname{tr} A)^2 / \|A\|_F^2`: d for d equal eigenvalues, 1 for a single one; shape ``(groups,)``.

    Args:
        factor: Symmetric PSD, shape ``(groups, d, d)``, or ``(groups, d)`` if diagonal. The result is NaN for zero.
    """
    trace = factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)
    norm = torch.linalg.vector_norm(factor.flatten(1), dim=-1)
    ranks: Tensor = (trace / norm).square()
    return ranks


def largest_eigenvalues(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The largest eigenvalue of each matrix, estimated from below; exact up to rounding for d up to LANCZOS_STEPS.

    Args:
        matrices: Symmetric PSD, shape ``(groups, d, d)``, or ``(groups, d)`` if diagonal.

    Returns:
        Per matrix, shape ``(groups,)``, in float64 on the CPU; NaN for a matrix that is not finite.
    """
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    batches: dict[object, list[int]] = {}
    for position, matrix in enumerate(matrices):
        small = matrix.ndim == 3 and matrix.shape[-1] <= LARGEST_BATCHED
        batches.setdefault((matrix.shape[-1], matrix.dtype, matrix.device) if small else position, []).append(position)
    tridiagonals: list[tuple[list[int], Tensor]] = []
    for positions in batches.values():
        matrix = matrices[positions[0]]
        if matrix.ndim == 2:
            found[positions[0]] = matrix.amax(-1).cpu().double()
            continue
        together = torch.cat([matrices[i] for i in positions]) if len(positions) > 1 else matrix
        tridiagonals.append((positions, _tridiagonal(together)))
    for positions, tridiagonal in tridiagonals:
        sizes = [matrices[i].shape[0] for i in positions]
        for position, part in zip(positions, torch.split(_top(tridiagonal.cpu().double()), sizes), strict=True):
            found[position] = part
    return found


def _tridiagonal(matrix: Tensor) -> Tensor:
    """Lanczos' tridiagonal matrix ``(groups, k, k)`` of a batch ``(groups, d, d)``, fully reorthogonalised."""
    groups, d, _ = matrix.shape
    k = min(LANCZOS_STEPS, d)
    # A separate generator leaves the global random stream unchanged.
    start = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / start.norm()).to(matrix).expand(groups, d)
    basis = [vector]
    result = matrix.new_zeros(groups, k, k)
    scale = torch.zeros_like(result[:, 0, 0])
    for i in range(k):
        image = (matrix @ basis[i].unsqueeze(-1)).squeeze(-1)
        known = torch.stack(basis, -1)
        result[:, i, i] = torch.sum(image * basis[i], -1)
        scale = torch.maximum(scale, result[:, i, i].abs())
        if i + 1 == k:
            break
        for _ in range(2):
            image = image - (known @ (known.mT @ image.unsqueeze(-1))).squeeze(-1)
        norm = torch.linalg.vector_norm(image, dim=-1)
        # In an invariant subspace the remainder is rounding, and no direction.
        norm = torch.where(norm > 16 * torch.finfo(matrix.dtype).eps * scale, norm, torch.zeros_like(norm))
        result[:, i, i + 1] = result[:, i + 1, i] = norm
        basis.append(image / torch.where(norm > 0, norm, torch.full_like(norm, torch.inf)).unsqueeze(-1))
    return result


def _top(tridiagonal: Tensor) -> Tensor:
    finite = torch.isfinite(tridiagonal).all(-1).all(-1)
    safe = torch.where(finite[:, None, None], tridiagonal, torch.zeros_like(tridiagonal))
    return torch.where(finite, torch.linalg.eigvalsh(safe)[:, -1], torch.full_like(safe[:, 0, 0], torch.nan))
