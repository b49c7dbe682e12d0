"""Systematic samples of a batch's rows, for batches with many more rows than a factor has dimensions.

With k parts, each example gives every k-th of its positions, with an offset that changes from example to example. So
all examples and all positions are used equally, without random numbers. Neighbouring positions of one example are
nearly redundant. Leaving out examples loses far more, most of all below a batch norm, which fixes the moments of the
whole batch but not those of a part of it (``benchmarks/accuracy/statistics_subset.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Most parts. With more, costs that do not depend on the rows dominate, above all the back-propagation.
MOST_PARTS = 16


def number_of_parts(examples: int, positions: int, dimensions: int, rows_per_dim: int | None) -> int:
    """The number of parts of a batch's rows, of which one is used; 1 for all rows.

    Args:
        examples: The number of examples.
        positions: The number of rows of an example.
        dimensions: The factor's dimensions.
        rows_per_dim: Enough rows for each dimension of the factor; None for all rows.
    """
    if rows_per_dim is None:
        return 1
    enough = examples * positions // (rows_per_dim * dimensions)
    return max(1, min(enough, examples, positions, MOST_PARTS))


def steps_along_axes(parts: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Steps along the first two axes with a product of at most ``parts``, as equal as possible."""
    across = sizes[1] if len(sizes) > 1 else 1
    pairs = [(first, min(parts // first, across)) for first in range(1, min(parts, sizes[0]) + 1)]
    best = max(pairs, key=lambda pair: (pair[0] * pair[1], min(pair), pair[0]))
    return (*best, *(1 for _ in sizes[2:]))[: len(sizes)]


def offsets(steps: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The offset of each part along each axis."""
    if not steps:
        yield ()
        return
    for first in range(steps[0]):
        for others in offsets(steps[1:]):
            yield first, *others


def one_part(rows: Tensor, parts: int) -> Tensor:
    """One part of rows ``(examples, positions, groups, d)``, as ``(1, rows, groups, d)``."""
    if parts == 1:
        return rows
    return torch.cat([rows[j::parts, j::parts].flatten(0, 1) for j in range(parts)]).unsqueeze(0)
