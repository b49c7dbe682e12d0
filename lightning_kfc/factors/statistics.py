"""Sums of outer products of canonical rows, and the factors A and G made from them.

Canonical rows have shape ``(examples, positions, groups, d)``; the row index r of the equations runs over
examples and positions together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows of the result per matrix product on a CPU: the fewest at full speed.
BLOCK = 128


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of statistics of tensors of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def append_ones(rows: Tensor) -> Tensor:
    """Rows in homogeneous form: a trailing 1 on the last axis, for the bias."""
    return torch.cat([rows, rows.new_ones((*rows.shape[:-1], 1))], dim=-1)


def second_moment_total(rows: Tensor) -> Tensor:
    r"""The sum :math:`\sum_r x_r x_r^\top` over examples and positions, for each group.

    Args:
        rows: Canonical rows, shape ``(examples, positions, groups, d)``.

    Returns:
        Symmetric matrices, shape ``(groups, d, d)``.
    """
    examples, positions, groups, d = rows.shape
    if rows.stride(1) == 1 and rows.stride(3) != 1 and positions > 1:
        # Positions are contiguous, as in images: this order avoids a copy.
        columns = rows.permute(2, 0, 3, 1)
        if positions >= 8 * d:
            return (columns @ columns.transpose(2, 3)).sum(1)
        return gram(columns.transpose(1, 2).reshape(groups, d, examples * positions))
    return gram(rows.flatten(0, 1).permute(1, 2, 0))


def gram(columns: Tensor) -> Tensor:
    r""":math:`X X^\top` of ``(groups, d, rows)``.

    On a CPU, large results are made from blocks of the upper triangle, in 0.5 to 0.7 of the time of the whole product
    (d from 288 to 1001). An accelerator is faster with one large product.
    """
    groups, d, _ = columns.shape
    if groups > 1 or d < 2 * BLOCK or columns.device.type != "cpu":
        return columns @ columns.transpose(1, 2)
    X = columns[0]
    result = X.new_empty(d, d)
    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        torch.mm(X[start:end], X[start:].T, out=result[start:end, start:])
        result[start:end, :start] = result[:start, start:end].T
    return result.unsqueeze(0)


def second_moment_diagonal(rows: Tensor) -> Tensor:
    """The diagonal of :func:`second_moment_total`, shape ``(groups, d)``, without the matrix."""
    # The norm reads the rows in one pass, without an array of squares.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=(0, 1))
    return norms.square()


def homogeneous_total(total: Tensor, row_sum: Tensor, rows: int) -> Tensor:
    r"""The second-moment total of rows with a trailing 1, from that of the rows without.

    Args:
        total: :math:`\sum_r x_r x_r^\top`, shape ``(groups, d, d)``.
        row_sum: :math:`\sum_r x_r`, shape ``(groups, d)``.
        rows: The number of rows R.

    Returns:
        Shape ``(groups, d + 1, d + 1)``.
    """
    groups, d, _ = total.shape
    bordered = total.new_empty((groups, d + 1, d + 1))
    bordered[:, :d, :d] = total
    bordered[:, :d, d] = row_sum
    bordered[:, d, :d] = row_sum
    bordered[:, d, d] = rows
    return bordered


def share_by_reduction(rows: Tensor, *, average: bool) -> Tensor:
    """Merge the positions of each example into one row ("reduce", Eschenhagen et al. 2023, arXiv:2311.00636).

    Args:
        rows: Canonical rows, shape ``(examples, positions, groups, d)``.
        average: Mean over positions (input rows) rather than their sum (output rows).

    Returns:
        Shape ``(examples, 1, groups, d)``.
    """
    return rows.mean(1, keepdim=True) if average else rows.sum(1, keepdim=True)


#: Sums over positions below this share of their expanded second moment have cancelled. Exact cancellation leaves 1e-14
#: in float32, and 1e-6 in half precision.
CANCELLED = 1e-4


def rows_cancel(reduced: Tensor, expanded: Tensor) -> bool:
    r"""Whether the rows of each example cancel in their sum, along any axis of the rows.

    A direction in which all sums vanish has no curvature in a reduced factor, however large its gradient is at single
    positions. An example are the keys of attention: the softmax removes their common shift.

    Args:
        reduced: :math:`\sum_n (\sum_t x_{nt})^2` for each axis, any shape.
        expanded: :math:`\sum_n \sum_t x_{nt}^2`, the same shape.
    """
    return bool((reduced < CANCELLED * expanded).any())


def per_example_gradients(input_rows: Tensor, output_rows: Tensor) -> Tensor:
    r"""Each example's gradient :math:`\sum_t g_{nt} \bar a_{nt}^\top`; shape ``(examples, groups, d_out, d_in)``."""
    return torch.einsum("ntgo,ntgi->ngoi", output_rows, input_rows)


@dataclass(frozen=True)
class InputStatistic:
    r"""One call's part of A: the total :math:`\sum_r \bar a_r \bar a_r^\top` and the number of rows.

    Attributes:
        total: Shape ``(groups, d_in, d_in)``, or ``(groups, d_in)`` for a diagonal A.
        rows: The number of rows R.
    """

    total: Tensor
    rows: int


@dataclass(frozen=True)
class Statistics:
    """Sums for the factors of one layer, over calls and micro-batches.

    Attributes:
        means: Totals that E1 divides by the number of rows, by factor name (``"A"``).
        sums: Totals of E2, by factor name (``"G"``).
        rows: The number of rows R behind ``means``.
    """

    means: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    rows: float

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both sets of rows together."""
        return Statistics(
            {name: total + other.means[name] for name, total in self.means.items()},
            {name: total + other.sums[name] for name, total in self.sums.items()},
            self.rows + other.rows,
        )

    def without_means(self) -> Statistics:
        """The same sums, with means of zero rows."""
        return Statistics({name: torch.zeros_like(total) for name, total in self.means.items()}, self.sums, 0)

    def factors(self) -> dict[str, Tensor]:
        """The factors of these rows: A by E1 (a mean over rows), G by E2 (a sum over rows)."""
        rows = max(self.rows, 1)
        return {**{name: total / rows for name, total in self.means.items()}, **self.sums}

    def is_finite(self) -> bool:
        """Whether every number in the statistics is finite."""
        return all(all_finite(total) for total in (*self.means.values(), *self.sums.values()))


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite.

    A sum keeps NaN and infinity, and reads the tensor once; a second test is needed only after an overflow.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
