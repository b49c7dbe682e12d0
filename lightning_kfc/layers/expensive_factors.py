"""Find factors that are too expensive to be dense, and are held as blocks or diagonals."""

from __future__ import annotations

from lightning_kfc.factors.cost import MOST_IN_A_STEP, cost_in_a_step, cost_in_the_mean, number_of_blocks
from lightning_kfc.layers.options import AdapterOptions


def blocks_by_cost(shape: tuple[int, int, int], rows: int, options: AdapterOptions) -> tuple[int, float]:
    """The number of blocks of a layer's larger factor, and the cost of whole factors.

    Args:
        shape: The shape of the layer's gradient, ``(groups, d_out, d_in)``.
        rows: The rows of a usual batch.
        options: The layer's options.

    Returns:
        The number, and the mean cost over a period relative to the layer's forward and backward.
    """
    (groups, d_out, d_in), bound = shape, options.max_factor_dim
    if groups > 1 or bound is None or max(d_out, d_in) > bound:
        return 1, 0.0
    cost, forward_and_backward = cost_in_the_mean(d_in, d_out, rows, options.every)
    return number_of_blocks(d_in, d_out, rows, options.every), cost / forward_and_backward


def expensive_side(shape: tuple[int, int, int], rows: int, options: AdapterOptions) -> dict[str, str]:
    """The larger factor with the reason, if dense factors would exceed the bounds on cost; else empty.

    Args:
        shape: The shape of the layer's gradient, ``(groups, d_out, d_in)``.
        rows: The rows of a usual batch.
        options: The layer's options.
    """
    groups, d_out, d_in = shape
    if groups > 1:
        cost, count = cost_in_a_step(d_in, d_out), f"{groups:,} dense ones"
        exceeds = cost > MOST_IN_A_STEP
    else:
        (blocks, cost), count = blocks_by_cost(shape, rows, options), "a dense one"
        exceeds = blocks > 1
    side = "A" if d_in >= d_out else "G"
    return {side: f"{count} would cost {cost:,.0f} x the layer's forward and backward"} if exceeds else {}
