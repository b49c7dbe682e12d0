"""Tensors of which each rank holds a part (DTensor)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_kfc.distributed.process_group import is_sharded


def whole(tensor: Any) -> Any:
    """A sharded tensor as a plain one, other tensors unchanged. Collective: call on every rank of its mesh."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(full: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor, in the layout of another tensor."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = replicated.redistribute(mesh, like.placements).to_local()
    return part
