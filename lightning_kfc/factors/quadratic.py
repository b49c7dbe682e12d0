r"""The quadratic form :math:`\delta^\top F\delta` of a layer's curvature, undamped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_kfc.factors.inverses.base import sandwich
from lightning_kfc.factors.trace import COLUMNS, estimated_trace

#: The estimate is made where it takes at most this share of the exact form's multiplications.
WORTHWHILE = 0.5


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


def estimated_quadratic_form(factors: Mapping[str, Tensor], delta: Tensor) -> Tensor:
    r"""The same as :func:`quadratic_form`, estimated where that is cheaper: for two large factors.

    It is the trace of :math:`\Delta^\top G\Delta A`, of which few columns are multiplied.
    """
    if not estimate_pays(factors, delta):
        return quadratic_form(factors, delta)
    A, G = factors["A"], factors["G"]
    return estimated_trace(lambda x: delta.mT @ (G @ (delta @ (A @ x))), len(delta), delta.shape[-1], delta)


def estimate_pays(factors: Mapping[str, Tensor], delta: Tensor) -> bool:
    """Whether the estimate takes far fewer multiplications than the exact form."""
    if "F" in factors or factors["A"].ndim != 3 or factors["G"].ndim != 3:
        return False
    d_out, d_in = delta.shape[1:]
    return 3 * COLUMNS * (d_out + d_in) ** 2 < WORTHWHILE * d_out * d_in * (d_out + d_in)
