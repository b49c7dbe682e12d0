"""Sparse tensors, such as gradients of embeddings and bags of words."""

from __future__ import annotations

import torch
from torch import Tensor

SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def dense(tensor: Tensor) -> Tensor:
    """The tensor, a sparse one as a dense one."""
    return tensor.to_dense() if tensor.layout in SPARSE else tensor


def overwrite(target: Tensor, values: Tensor) -> None:
    """Fill a tensor; a sparse one keeps its sparsity: values elsewhere are left out."""
    if target.is_sparse:
        indices = target.coalesce().indices()
        kept = values[tuple(indices)].to(target.dtype)
        values = torch.sparse_coo_tensor(indices, kept, target.shape, is_coalesced=True, check_invariants=False)
    target.copy_(values)
