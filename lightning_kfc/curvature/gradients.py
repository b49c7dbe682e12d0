"""Gradients of a layer's parameters, some of them sharded or sparse, from and to one matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.distributed.sharded_tensors import part_of
from lightning_kfc.layers import Adapter
from lightning_kfc.utilities.torch_internals import values_of


def is_zero(gradient: Tensor) -> bool:
    """Whether all elements of a gradient are zero."""
    return not bool(values_of(gradient).any())


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
    targets = {
        role: torch.empty(g.shape, dtype=g.dtype, device=g.device) if is_sharded(g) else g
        for role, g in gradients.items()
    }
    adapter.write(matrix, targets)
    for role, gradient in gradients.items():
        if is_sharded(gradient):
            local: Tensor = gradient.to_local()  # type: ignore[attr-defined]  # a DTensor has it
            local.copy_(part_of(targets[role], gradient))
    return True
