"""Symmetric matrices as triangles in flat buffers, as they travel between ranks.

A triangle is laid out as a staircase: the rows in blocks, each up to the end of its own diagonal block. That is a few
copies of contiguous pieces, which run at the speed of memory where a table of indices, or LAPACK's rectangular
format with its transposed half, takes 10 times as long. With b blocks a matrix takes (1 + 1/b)/2 of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

Shape = tuple[int, ...]

#: Rows of a block, at least, and blocks, at most: below the first a copy's fixed cost counts for more than its bytes.
SMALLEST_BLOCK, MOST_BLOCKS = 64, 16


def _steps(d: int) -> Iterator[tuple[int, int]]:
    """The first row and the end of each block."""
    rows = -(-d // max(1, min(MOST_BLOCKS, d // SMALLEST_BLOCK)))
    return ((first, min(first + rows, d)) for first in range(0, d, rows))


def _is_packed(shape: Shape, symmetric: bool) -> bool:
    # Three axes are a matrix per group; a factor of two is a diagonal.
    return symmetric and len(shape) == 3


def packed_numel(shape: Shape, *, symmetric: bool = True) -> int:
    """The number of elements that a tensor takes in a buffer: about half of them where it is symmetric matrices.

    Args:
        shape: ``(groups, d, d)`` for symmetric matrices, or any shape for what is taken as it is.
        symmetric: Whether three axes say symmetric matrices.
    """
    if not _is_packed(shape, symmetric):
        return math.prod(shape)
    return shape[0] * sum((end - first) * end for first, end in _steps(shape[1]))


def pack(tensor: Tensor, into: Tensor, *, symmetric: bool = True) -> None:
    """Write a tensor into its part of a buffer, of which a symmetric matrix's lower triangle is enough.

    Args:
        tensor: Of a shape as :func:`packed_numel` takes it.
        into: A contiguous, flat part of a buffer, of :func:`packed_numel` elements; keeps its own precision.
        symmetric: Whether three axes say symmetric matrices.
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
    """The blocks' rows, and where they are in the buffer, ``(groups, rows, end)``."""
    groups, offset = shape[0], 0
    for first, end in _steps(shape[1]):
        numel = groups * (end - first) * end
        yield (first, end), flat[offset : offset + numel].view(groups, end - first, end)
        offset += numel
