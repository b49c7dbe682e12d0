"""Products of matrices with a groups axis; the rows of large results are aligned."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of large matrices start at multiples of this many elements. A bias makes d_in odd, and a matrix product with
#: unaligned rows took 1.5 times as long (MKL, 785 columns).
ALIGNMENT = 16

#: Fewest columns of an aligned matrix; smaller ones gain nothing.
SMALLEST_ALIGNED = 64

#: Fewest bytes of an aligned number. Products in bfloat16 read what lies between the rows, and a NaN there enters the
#: result (oneDNN with AMX, https://github.com/uxlfoundation/oneDNN/issues/5717).
SMALLEST_NUMBER = 4


def aligned_empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor; the rows of a large one start at multiples of ``ALIGNMENT`` elements."""
    *leading, columns = shape
    if like.dtype.itemsize < SMALLEST_NUMBER or columns < SMALLEST_ALIGNED or columns % ALIGNMENT == 0:
        return like.new_empty(shape)
    return like.new_empty((*leading, columns + -columns % ALIGNMENT))[..., :columns]


def aligned(matrix: Tensor) -> Tensor:
    """A copy of a matrix with aligned rows; a diagonal, or an aligned matrix, is returned itself."""
    if matrix.dtype.itemsize < SMALLEST_NUMBER:
        return matrix.contiguous()
    columns = matrix.shape[-1]
    if matrix.ndim < 3 or columns < SMALLEST_ALIGNED or matrix.stride(-2) % ALIGNMENT == 0:
        return matrix
    return aligned_empty(matrix, *matrix.shape).copy_(matrix)


def sandwich(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """``left @ middle @ right`` per group, ``(..., groups, d_out, d_in)``; a two-axis factor is a diagonal."""
    if middle.ndim == 3 and middle.shape[0] == 1 and left.ndim == 3 and right.ndim == 3:
        # Most layers have one group, and a plain product is faster than a batch of one.
        half = torch.mm(left[0], middle[0], out=aligned_empty(middle, *middle.shape[1:]))
        return torch.mm(half, right[0], out=aligned_empty(middle, *middle.shape[1:])).unsqueeze(0)
    half = left @ middle if left.ndim == 3 else left.unsqueeze(-1) * middle
    return half @ right if right.ndim == 3 else half * right.unsqueeze(-2)


def transposed(factor: Tensor) -> Tensor:
    """The transpose per group; a diagonal is returned itself."""
    return factor.mT if factor.ndim == 3 else factor
