"""Sparse gradients, as of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(tensor: Tensor) -> Tensor:
    """The tensor, a sparse gradient as a dense one."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def overwrite(target: Tensor, values: Tensor) -> None:
    """Fill a tensor; a sparse one keeps its sparsity: values elsewhere are left out."""
    if target.is_sparse:
        indices = target.coalesce().indices()
        kept = values[tuple(indices)].to(target.dtype)
        values = torch.sparse_coo_tensor(indices, kept, target.shape, is_coalesced=True, check_invariants=False)
    target.copy_(values)
