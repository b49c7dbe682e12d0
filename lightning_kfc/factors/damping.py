"""Factored Tikhonov damping (E4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: The least and the largest automatic damping, as multiples of a layer's mean curvature.
LEAST_DAMPING, LARGEST_DAMPING = 1e-8, 100.0
#: The largest damping against noise, likewise.
LARGEST_NOISE_DAMPING = 10.0


def mean_diagonal(factor: Tensor) -> Tensor:
    """The mean diagonal entry of a dense ``(..., d, d)`` factor, or of a diagonal ``(groups, d)`` one."""
    if factor.ndim == 2:
        return factor.mean(-1)
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def inputs_per_row(factors: Mapping[str, Tensor], rows: int | None) -> float:
    """The inputs of a layer with a dense factor A, as a multiple of the rows of a step; 0 for another layer.

    Args:
        factors: The layer's factors, dense ``(groups, d, d)`` or diagonal ``(groups, d)``.
        rows: The rows of a step; None if unknown.
    """
    A = factors.get("A")
    return A.shape[-1] / rows if rows and A is not None and A.ndim == 3 else 0.0


def within_curvature(damping: float, noise_damping: float, factors: Mapping[str, Tensor]) -> float:
    """An automatic damping, limited to a range of multiples of a layer's mean curvature.

    A loss that is nearly 0 must not leave singular factors without damping. Far above the curvature, a step is that of
    plain gradient descent.

    Args:
        damping: The damping, in units of the loss and the weights; at least 0.
        noise_damping: The least damping against noise, in the same units; at least 0.
        factors: ``A`` and ``G``, or ``F``; each dense ``(groups, d, d)`` or diagonal ``(groups, d)``. Without
            curvature, the damping stays.
    """
    # The mean diagonal entry of the layer's Fisher matrix, over all groups.
    mean = float(torch.stack([mean_diagonal(factor).double() for factor in factors.values()]).prod(0).mean())
    limited = min(damping, LARGEST_DAMPING * mean) if mean > 0 else damping
    least = max(LEAST_DAMPING * mean, torch.finfo(torch.float32).tiny)
    return max(limited, min(noise_damping, LARGEST_NOISE_DAMPING * mean), least)


def balance(A: Tensor, G: Tensor) -> Tensor:
    r"""The :math:`\pi` of E4, shape ``(groups,)``: the root of the ratio of mean diagonals, A to G.

    It is 1 if either trace is zero or not finite, as in a layer with dead units only.
    """
    numerator, denominator = mean_diagonal(A), mean_diagonal(G)
    # Two roots, since the ratio would underflow for tiny losses.
    pi = numerator.clamp(min=0).sqrt() / denominator.clamp(min=0).sqrt()
    return torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))


def add_diagonal(factor: Tensor, amount: Tensor) -> Tensor:
    """The factor with ``amount`` (one number a group) added to its diagonal, as a new tensor."""
    if factor.ndim == 2:
        return factor + amount.unsqueeze(-1)
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(amount.unsqueeze(-1))
    return damped


def check_damping(damping: float) -> None:
    """Require a positive damping.

    Raises:
        ValueError: If it is not positive.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping!r}: the factors alone may be singular.")


def split_damping(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""Spread ``damping`` over both factors, keeping their scales balanced (E4).

    Returns :math:`A + \pi\sqrt\lambda I` and :math:`G + \pi^{-1}\sqrt\lambda I`, :math:`\pi^2` the ratio
    of mean diagonals, A to G (Martens & Grosse 2015, arXiv:1503.05671, sec. 6.3).

    Args:
        A: Input factor, symmetric PSD, shape ``(groups, d_in, d_in)``, or ``(groups, d_in)`` if diagonal.
        G: Output factor, symmetric PSD, shape ``(groups, d_out, d_out)``; in units of the loss.
        damping: :math:`\lambda > 0`, in the units of ``A ⊗ G``.

    Raises:
        ValueError: If ``damping`` is not positive.
    """
    check_damping(damping)
    pi = balance(A, G)
    root = damping**0.5
    return add_diagonal(A, pi * root), add_diagonal(G, root / pi)
