"""Tensors of which each rank holds a part (DTensor): read whole, written part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.layers import Adapter, Forward


def whole(tensor: Any) -> Any:
    """A sharded tensor as a plain one, which all ranks of its mesh must ask for together; anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_forward(forward: Forward) -> Forward:
    """What a tensor-parallel module read, and returned, as if one rank had run it."""
    tensors = [*forward.args, *forward.kwargs.values(), forward.output]
    if not any(map(is_sharded, tensors)):
        return forward
    kwargs = {name: whole(value) for name, value in forward.kwargs.items()}
    return Forward(tuple(map(whole, forward.args)), kwargs, forward.output)


def part_of(full: Tensor, like: Any) -> Tensor:
    """The part of a tensor, which all ranks have whole, that this rank holds in the layout of another one."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = replicated.redistribute(mesh, like.placements).to_local()
    return part


def write(adapter: Adapter, matrix: Tensor, gradients: Mapping[str, Tensor]) -> None:
    """Fill gradients, some of them sharded, from a matrix ``(groups, d_out, d_in)`` that all ranks have.

    Args:
        adapter: Knows the layout.
        matrix: The update.
        gradients: By role.
    """
    if not any(map(is_sharded, gradients.values())):
        adapter.write(matrix, gradients)
        return
    targets = {
        role: torch.empty(g.shape, dtype=g.dtype, device=g.device) if is_sharded(g) else g
        for role, g in gradients.items()
    }
    adapter.write(matrix, targets)
    for role, gradient in gradients.items():
        if is_sharded(gradient):
            local: Tensor = gradient.to_local()  # type: ignore[attr-defined]  # a DTensor has it
            local.copy_(part_of(targets[role], gradient))
