"""Recorded operations, and the tensors from outside that they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.trust_region.operators import traits_of
from lightning_kfc.trust_region.random_draws import RandomDraw
from lightning_kfc.utilities.torch_internals import version_of


class Slot(int):
    """Stands for a tensor in the arguments of an operation: its number on the tape."""


# Not frozen: one is made per operation, and a frozen one takes twice the time.
@dataclass(slots=True)
class Operation:
    """One recorded operation.

    Attributes:
        function: The operator.
        args: Its positional arguments, with a slot for each tensor.
        kwargs: Its keyword arguments, likewise.
        used: All slots among its arguments.
        nested: Whether a container among its arguments holds slots.
        made: The slots of the tensors that it returned, in order; None for other results.
        reads: The numbers of the storages that it read.
        mutates: The numbers of the storages that it wrote in place.
        draw: The state of its random generator before it ran; None where it draws no random numbers.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    used: list[Slot]
    nested: bool
    made: list[Slot | None]
    reads: set[int]
    mutates: set[int]
    draw: RandomDraw | None = None


@dataclass(frozen=True)
class Outside:
    """A tensor that no recorded operation has made.

    Attributes:
        tensor: The tensor.
        alias: A second tensor on the same memory, since the first one's ``.data`` may be exchanged later.
        version: Its number of in-place writes at the time of the read.
    """

    tensor: Tensor
    alias: Tensor
    version: int


#: Operations in order, each with the slots that no later operation uses.
Slice = list[tuple[Operation, set[Slot]]]


class Recording:
    """Recorded operations and the tensors that they read, without intermediate results.

    Attributes:
        operations: The operations in order.
        slot_storage: The number of each slot's storage.
        outside: The tensors that no recorded operation has made, by slot.
        overwritten: The former content of overwritten storages from outside, by their numbers.
        aliased: The numbers of the storages that unrecorded tensors share.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.slot_storage: list[int] = []
        self.outside: dict[Slot, Outside] = {}
        self.overwritten: dict[int, torch.UntypedStorage] = {}
        self.aliased: set[int] = set()
        self._slices: dict[tuple[Slot, int, bool], Slice] = {}

    def clear(self) -> None:
        """Drop operations and tensors."""
        self.operations.clear()
        self.outside.clear()
        self.overwritten.clear()

    def written_unseen(self, slot: Slot) -> bool:
        """Whether a tensor from outside was written later by an unrecorded operation."""
        outside = self.outside[slot]
        return self.slot_storage[slot] not in self.overwritten and version_of(outside.tensor) != outside.version

    def is_stale(self, slot: Slot, length: int) -> bool:
        """Whether an unrecorded operation has written a source of a tensor later."""
        operations = self.slice(slot, length, with_collectives=False)
        read = {used for operation, _ in operations for used in operation.used}
        return any(self.written_unseen(used) for used in read if used in self.outside)

    def slice(self, slot: Slot, length: int, *, with_collectives: bool) -> Slice:
        """The operations on which a tensor depends, each with the slots that it uses last.

        Args:
            slot: The tensor.
            length: The number of considered operations.
            with_collectives: Whether to include all recorded collectives.
        """
        key = slot, length, with_collectives
        if key not in self._slices:
            live, needed, kept = {self.slot_storage[slot]}, {slot}, []
            for operation in reversed(self.operations[:length]):
                collective = with_collectives and traits_of(operation.function).collective
                made = [result for result in operation.made if result is not None]
                if collective or not needed.isdisjoint(made) or not live.isdisjoint(operation.mutates):
                    live |= operation.reads
                    last = {*operation.used, *made} - needed
                    needed |= last
                    kept.append((operation, last))
            self._slices[key] = kept[::-1]
        return self._slices[key]
