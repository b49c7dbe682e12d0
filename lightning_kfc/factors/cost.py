r"""What a pair of factors costs beside its layer's own forward and backward, from shapes alone.

In multiply-adds, for each row (one use of the weight) and group: the layer itself takes three products of
:math:`d_{out}d_{in}`; the second moments take :math:`d_{in}^2 + d_{out}^2`. A refresh of the inverse takes about
:math:`(d_{in}^3 + d_{out}^3)/2` for each group. Numbers that are only moved (the patches of a convolution) count
:data:`MOVE_COST` each.

Only sizes of the parameters enter, and none of the data: all ranks, and all steps, choose the same form, before
anything runs. The number of rows is taken to be :data:`ROWS_PER_DIM` times the larger dimension. With more rows the
statistics are taken from a part of them (:mod:`lightning_kfc.factors.row_sampling`).
"""

from __future__ import annotations

#: A step that takes statistics and refreshes the inverse may cost so many times the layer's own forward and backward.
MOST_IN_A_STEP = 64.0

#: Moving a number costs as much as so many multiply-adds of a matrix product.
MOVE_COST = 8

#: Rows for each dimension.
ROWS_PER_DIM = 8


def cost_in_a_step(d_in: int, d_out: int) -> float:
    """Statistics and inverse of a pair of dense factors over the forward and backward of its group, as multiply-adds.

    Args:
        d_in: Dimensions of A.
        d_out: Dimensions of G.
    """
    rows = ROWS_PER_DIM * max(d_in, d_out)
    own = 3 * rows * (d_in * d_out + MOVE_COST * d_out)
    statistics = rows * (d_in**2 + d_out**2 + MOVE_COST * d_in)
    return (statistics + (d_in**3 + d_out**3) / 2) / own
