"""Gradients of a layer's parameters, some of them sharded or sparse, from and to one matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.distributed.sharded_tensors import part_of
from lightning_kfc.layers import Adapter


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """The gradients of a layer's parameters, by role; None if one is missing, or without parameters."""
    found = {role: gradient for role, p in parameters.items() if (gradient := p.grad) is not None}
    return found if found and len(found) == len(parameters) else None


def write_matrix(adapter: Adapter, matrix: Tensor, gradients: Mapping[str, Tensor]) -> bool:
    """Fill gradients, some of them sharded, from a matrix ``(groups, d_out, d_in)`` that all ranks have.

    Args:
        adapter: The layer's adapter.
        matrix: The update.
        gradients: The gradients, by role.

    Returns:
        False if the gradients' precision (float16) cannot hold the matrix; they then stay unchanged.
    """
    half = any(gradient.dtype == torch.float16 for gradient in gradients.values())
    if half and float(matrix.abs().max()) > torch.finfo(torch.float16).max:
        return False
    sharded = {role: g for role, g in gradients.items() if is_sharded(g)}
    wholes = {role: torch.empty(g.shape, dtype=g.dtype, device=g.device) for role, g in sharded.items()}
    adapter.write(matrix, {**gradients, **wholes})
    for role, gradient in sharded.items():
        local: Tensor = gradient.to_local()  # type: ignore[attr-defined]  # a DTensor has it
        local.copy_(part_of(wholes[role], gradient))
    return True
