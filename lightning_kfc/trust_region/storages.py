"""Identity and memory of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kfc.utilities.torch_internals import address_of, free, negated_view, weak_reference


def storage_address(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage; None for tensors without one (sparse ones)."""
    return address_of(tensor.untyped_storage()) if tensor.layout is torch.strided else None


def on_storage(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor of the same geometry on another storage."""
    moved = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    moved = moved.conj() if tensor.is_conj() else moved
    return negated_view(moved) if tensor.is_neg() else moved


class StorageReferences:
    """Weak references to storages.

    While a reference is held, no other storage gets its storage's address.
    """

    def __init__(self) -> None:
        self._references: list[Any] = []

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Hold a weak reference to a storage; its memory may be freed."""
        self._references.append(weak_reference(storage))

    def release(self) -> None:
        """Drop all references."""
        while self._references:
            free(self._references.pop())

    def __del__(self) -> None:
        self.release()
