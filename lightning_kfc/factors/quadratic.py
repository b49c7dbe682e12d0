r"""The quadratic form :math:`\delta^\top F\delta` of a layer's curvature, undamped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_kfc.factors.inverses.base import sandwich


def quadratic_form(factors: Mapping[str, Tensor], delta: Tensor) -> Tensor:
    r""":math:`\langle G\Delta A, \Delta\rangle` for Kronecker factors, or the same for blocks; a scalar.

    Args:
        factors: ``"A"`` and ``"G"``, or ``"F"``: with their groups axis.
        delta: A change of the parameters, shape ``(groups, d_out, d_in)``.
    """
    if "F" not in factors:
        return torch.sum(sandwich(factors["G"], delta, factors["A"]) * delta)
    F, flat = factors["F"], delta.flatten(1)
    if F.ndim == 2:
        return torch.sum(F * flat.square())
    return torch.einsum("gi,gij,gj->", flat, F, flat)
