"""Symmetric matrices as triangles in flat buffers, for storage and for messages between ranks.

A triangle is stored as blocks of rows, each up to the end of its diagonal block. These are a few contiguous copies; a
table of indices, or LAPACK's rectangular format, takes 10 times as long. With b blocks a matrix takes (1 + 1/b)/2 of
its elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

Shape = tuple[int, ...]

#: Fewest rows of a block, and most blocks: in smaller copies the fixed cost dominates.
SMALLEST_BLOCK, MOST_BLOCKS = 64, 16


def _steps(d: int) -> Iterator[tuple[int, int]]:
    """The first row and the end of each block."""
    rows = -(-d // max(1, min(MOST_BLOCKS, d // SMALLEST_BLOCK)))
    return ((first, min(first + rows, d)) for first in range(0, d, rows))


def _is_packed(shape: Shape, symmetric: bool) -> bool:
    # Three axes: a matrix per group. Two axes: a diagonal.
    return symmetric and len(shape) == 3


def packed_numel(shape: Shape, *, symmetric: bool = True) -> int:
    """The number of a tensor's elements in a buffer: about half for symmetric matrices.

    Args:
        shape: ``(groups, d, d)`` for symmetric matrices; other shapes are not packed.
        symmetric: Whether a tensor of three axes holds symmetric matrices.
    """
    if not _is_packed(shape, symmetric):
        return math.prod(shape)
    return shape[0] * sum((end - first) * end for first, end in _steps(shape[1]))


def pack(tensor: Tensor, into: Tensor, *, symmetric: bool = True) -> None:
    """Write a tensor into a buffer; of symmetric matrices only the lower triangle is read.

    Args:
        tensor: The tensor, of a shape as in :func:`packed_numel`.
        into: A contiguous, flat part of a buffer, of :func:`packed_numel` elements and any precision.
        symmetric: Whether a tensor of three axes holds symmetric matrices.
    """
    if not _is_packed(tuple(tensor.shape), symmetric):
        into.copy_(tensor.reshape(-1))
        return
    for (first, end), part in _parts(into, tuple(tensor.shape)):
        part.copy_(tensor[:, first:end, :end])


def unpack(packed: Tensor, shape: Shape, *, symmetric: bool = True) -> Tensor:
    """The inverse of :func:`pack`: a new tensor in the buffer's precision."""
    if not _is_packed(shape, symmetric):
        return packed.reshape(shape).clone()
    full = packed.new_empty(shape)
    for (first, end), part in _parts(packed, shape):
        full[:, first:end, :end] = part
        full[:, :first, first:end] = part[..., :first].mT
    return full


def _parts(flat: Tensor, shape: Shape) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The rows of each block, and its view of the buffer, ``(groups, rows, end)``."""
    groups, offset = shape[0], 0
    for first, end in _steps(shape[1]):
        numel = groups * (end - first) * end
        yield (first, end), flat[offset : offset + numel].view(groups, end - first, end)
        offset += numel
