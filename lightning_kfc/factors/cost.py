r"""What a pair of factors costs beside its layer's own forward and backward, from shapes alone.

In multiply-adds, for each row (one use of the weight) and group: the layer itself takes three products of
:math:`d_{out}d_{in}`; the second moments take :math:`d_{in}^2 + d_{out}^2`. A refresh of the inverse takes about
:math:`(d_{in}^3 + d_{out}^3)/2` for each group. Numbers that are only moved (the patches of a convolution) count
:data:`MOVE_COST` each.

A layer with one pair is reckoned with by what it costs in the mean over the periods at which statistics are taken and
inverses refreshed, beside the two products of each step; by then few rows are the dear case, and a layer that takes
little in all may cost many times its own. The bounds are :data:`MOST_IN_THE_MEAN` and :data:`CHEAP`.

Only sizes of the parameters enter, and none of the data: all ranks, and all steps, choose the same form, before
anything runs. The number of rows is taken to be :data:`ROWS_PER_DIM` times the larger dimension where there are several
groups, and else what the kind of layer usually has. With more rows the statistics are taken from a part of them
(:mod:`lightning_kfc.factors.row_sampling`).
"""

from __future__ import annotations

import functools

#: A step that takes statistics and refreshes the inverse may cost so many times the layer's own forward and backward.
MOST_IN_A_STEP = 64.0

#: A pair may cost so many times the layer's own forward and backward, in the mean over the steps of a period.
MOST_IN_THE_MEAN = 16.0

#: So many multiply-adds a step are never too many: some 0.1 seconds of a processor core.
CHEAP = 4e9

#: Blocks are not cut smaller than this.
SMALLEST_BLOCK = 256

#: Moving a number costs as much as so many multiply-adds of a matrix product.
MOVE_COST = 8

#: Rows for each dimension.
ROWS_PER_DIM = 8


def cost_in_a_step(d_in: int, d_out: int) -> float:
    """The cost of statistics and inverse of two dense factors relative to the forward and backward of their group.

    Args:
        d_in: Dimensions of A.
        d_out: Dimensions of G.
    """
    rows = ROWS_PER_DIM * max(d_in, d_out)
    own = 3 * rows * (d_in * d_out + MOVE_COST * d_out)
    statistics = rows * (d_in**2 + d_out**2 + MOVE_COST * d_in)
    return (statistics + (d_in**3 + d_out**3) / 2) / own


@functools.lru_cache(maxsize=256)
def cost_in_the_mean(d_in: int, d_out: int, rows: int, every: tuple[int, int], blocks: int = 1) -> tuple[float, float]:
    """What a pair of dense factors costs in a step, in the mean over a period, in multiply-adds, and the layer itself.

    Args:
        d_in: Dimensions of A.
        d_out: Dimensions of G.
        rows: The rows of a step.
        every: Statistics are taken, and inverses refreshed, every so many steps.
        blocks: The larger factor is cut into so many equal ones.
    """
    large, small = max(d_in, d_out), min(d_in, d_out)
    block = large / blocks
    statistics = rows * (large * block + small**2)
    inverses = blocks * (block**3 + small**3) / 2
    products = large * small * (block + small)
    if blocks == 1:
        # By way of the gradient's range.
        products = min(products, 2 * rows * (large**2 + small**2))
    return statistics / every[0] + inverses / every[1] + products, 3 * rows * large * small


@functools.lru_cache(maxsize=256)
def number_of_blocks(d_in: int, d_out: int, rows: int, every: tuple[int, int]) -> int:
    """Into how many equal blocks to cut the larger factor, so that the pair keeps to the bounds; 1 for none.

    Args:
        d_in: Dimensions of A.
        d_out: Dimensions of G.
        rows: The rows of a step.
        every: Statistics are taken, and inverses refreshed, every so many steps.
    """
    blocks = 1
    while max(d_in, d_out) > SMALLEST_BLOCK * blocks:
        cost, own = cost_in_the_mean(d_in, d_out, rows, every, blocks)
        if cost <= max(CHEAP, MOST_IN_THE_MEAN * own):
            break
        blocks *= 2
    return blocks
