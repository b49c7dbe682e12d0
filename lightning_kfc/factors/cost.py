r"""The cost of a pair of factors relative to its layer's forward and backward, from shapes alone.

Costs are in multiply-adds. For each row (one use of the weight) and group, the layer takes three products of
:math:`d_{out}d_{in}`, and the second moments take :math:`d_{in}^2 + d_{out}^2`. A refresh of the inverse takes about
:math:`(d_{in}^3 + d_{out}^3)/2` for each group. Numbers that are only moved (the patches of a convolution) count
:data:`MOVE_COST` each.

A layer with several groups is bounded by :data:`MOST_IN_A_STEP`. A layer with one pair is bounded by the mean cost over
a period, including the two products of each step: by :data:`MOST_IN_THE_MEAN`, or by :data:`CHEAP` for small layers.

The costs depend on no data, so that all ranks and all steps choose the same form before training starts. The number of
rows is :data:`ROWS_PER_DIM` times the larger dimension for several groups, and else typical for the kind of layer. Of
more rows, a part is used (:mod:`lightning_kfc.factors.row_sampling`).
"""

from __future__ import annotations

import functools

#: The largest cost of a step with statistics and inverse, relative to the layer's forward and backward.
MOST_IN_A_STEP = 64.0

#: The largest mean cost of a pair over a period, relative to the layer's forward and backward of the typical rows.
#: Fewer rows make a pair cheaper, and its layer more so.
MOST_IN_THE_MEAN = 16.0

#: Multiply-adds per step that are never too many: about 0.1 seconds of a processor core.
CHEAP = 4e9

#: The smallest size of a block.
SMALLEST_BLOCK = 256

#: The cost to move a number, in multiply-adds of a matrix product.
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
    """The multiply-adds per step of a pair of dense factors, as a mean over a period, and of the layer itself.

    Args:
        d_in: Dimensions of A.
        d_out: Dimensions of G.
        rows: The rows of a step.
        every: The periods of statistics and inverses, in steps.
        blocks: The number of equal blocks of the larger factor.
    """
    large, small = max(d_in, d_out), min(d_in, d_out)
    block = large / blocks
    statistics = rows * (large * block + small**2)
    inverses = blocks * (block**3 + small**3) / 2
    products = large * small * (block + small)
    if blocks == 1:
        # With few rows, within the gradient's range.
        products = min(products, 2 * rows * (large**2 + small**2))
    return statistics / every[0] + inverses / every[1] + products, 3 * rows * large * small


@functools.lru_cache(maxsize=256)
def number_of_blocks(d_in: int, d_out: int, rows: int, every: tuple[int, int]) -> int:
    """The number of equal blocks of the larger factor with which the pair keeps the bounds.

    Args:
        d_in: Dimensions of A.
        d_out: Dimensions of G.
        rows: The rows of a step.
        every: The periods of statistics and inverses, in steps.
    """
    blocks = 1
    while max(d_in, d_out) > SMALLEST_BLOCK * blocks:
        cost, own = cost_in_the_mean(d_in, d_out, rows, every, blocks)
        if cost <= max(CHEAP, MOST_IN_THE_MEAN * own):
            break
        blocks *= 2
    return blocks
