"""Some examples of a batch, whatever nest of containers its tensors are in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.part_law import NotDivisibleError

#: Values that belong to no example, and go into every part as they are.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Examples:
    """A batch as it is now, of which parts can be had later.

    One rule says what its examples are: all tensors have the same size along their first axis, and nothing else in
    the batch could hold something for each example.

    Args:
        batch: Tensors in tuples, lists, dicts and dataclasses, nested as they may be.

    Attributes:
        count: The number of examples.

    Raises:
        NotDivisibleError: If the rule does not hold.
    """

    def __init__(self, batch: Any) -> None:
        tensors = list(_tensors(batch))
        if not tensors:
            raise NotDivisibleError("the batch holds no tensors")
        for tensor in tensors:
            if tensor.is_nested or tensor.layout != torch.strided:
                raise NotDivisibleError("the batch holds a sparse or a nested tensor")
            if tensor.ndim == 0:
                raise NotDivisibleError("the batch holds a tensor without axes")
        sizes = sorted({tensor.shape[0] for tensor in tensors})
        if len(sizes) > 1:
            different = ", ".join(map(str, sizes))
            raise NotDivisibleError(f"the batch's tensors have different sizes along their first axis: {different}")
        self.count = sizes[0]
        _refuse_lists_of_examples(batch, self.count, outermost=True)
        # Containers of its own: a training step may take entries out of those that it is given.
        self._batch = _rebuilt(batch, lambda tensor: tensor)
        self._versions = self._present_versions()

    def part(self, indices: Tensor) -> Any:
        """The examples of some indices, copied, in containers like those of the batch.

        Raises:
            NotDivisibleError: If the batch was changed in place since.
        """
        if self._present_versions() != self._versions:
            raise NotDivisibleError("the training step changes tensors of its batch in place")
        return _rebuilt(self._batch, lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def _present_versions(self) -> list[int]:
        # A tensor made under inference mode has no version.
        return [0 if tensor.is_inference() else tensor._version for tensor in _tensors(self._batch)]


def _children(value: Any) -> list[Any] | None:
    """What a container holds; None for what is no container that can be rebuilt."""
    if isinstance(value, MutableMapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    children = _children(value)
    if children is None and not isinstance(value, PLAIN):
        raise NotDivisibleError(
            f"the batch holds a {type(value).__name__}, of which it is not known what belongs to which example"
        )
    for child in children or ():
        yield from _tensors(child)


def _refuse_lists_of_examples(value: Any, count: int, *, outermost: bool = False) -> None:
    """Refuse sequences and strings with an entry for each example; the batch itself may have as many entries."""
    if isinstance(value, (str, bytes, list, tuple)) and len(value) == count and not outermost:
        raise NotDivisibleError(
            f"the batch holds a {type(value).__name__} with as many entries as it has examples, {count}"
        )
    for child in _children(value) or ():
        _refuse_lists_of_examples(child, count)


def _rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with changed tensors; what is neither is shared."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        for key, child in value.items():
            mapping[key] = _rebuilt(child, change)
        return mapping
    if isinstance(value, (tuple, list)):
        children = [_rebuilt(child, change) for child in value]
        if isinstance(value, tuple):
            return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
        sequence = copy.copy(value)
        sequence[:] = children
        return sequence
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        instance = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(instance, field.name, _rebuilt(getattr(value, field.name), change))
        return instance
    return value
