"""Identity and memory of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def storage_address(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage; None for tensors without one (sparse ones)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None


def version(tensor: Tensor) -> int:
    """A tensor's number of in-place writes."""
    # A tensor made under inference mode has none.
    return 0 if tensor.is_inference() else tensor._version


def on_storage(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor of the same geometry on another storage."""
    moved = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    moved = moved.conj() if tensor.is_conj() else moved
    return torch._neg_view(moved) if tensor.is_neg() else moved


class StorageReferences:
    """Weak references to storages.

    While they are held, no later storage gets the address of one that is gone.
    """

    def __init__(self) -> None:
        self._references: list[Any] = []

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Hold a reference to a storage, which does not keep its memory."""
        self._references.append(storage._weak_ref())

    def release(self) -> None:
        """Drop all references."""
        while self._references:
            torch.UntypedStorage._free_weak_ref(self._references.pop())  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def __del__(self) -> None:
        self.release()
