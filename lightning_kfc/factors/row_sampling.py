"""A part of a batch's rows, where there are many more of them than a factor has dimensions.

With k parts, every k-th example gives every k-th of its positions, the next example the next ones: all examples and all
positions count alike, in every step, and nothing is drawn (systematic sampling). Neighbouring positions of one
example say much the same; leaving out examples loses far more, most of all below a batch norm, which fixes
the moments of the whole batch but not those of a part of it (``benchmarks/accuracy/statistics_subset.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: There are no more parts: what does not shrink with them, the back-propagation above all, rules by then.
MOST_PARTS = 16


def number_of_parts(examples: int, positions: int, dimensions: int, rows_per_dim: int | None) -> int:
    """How many parts to divide a batch's rows into, of which one is taken; 1 for all rows.

    Args:
        examples: The number of examples.
        positions: The number of rows of an example.
        dimensions: That of the factor.
        rows_per_dim: So many times the factor's dimensions are enough rows; None for all.
    """
    if rows_per_dim is None:
        return 1
    enough = examples * positions // (rows_per_dim * dimensions)
    return max(1, min(enough, examples, positions, MOST_PARTS))


def steps_along_axes(parts: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """At most so many parts, as a product of one step an axis, along the first two; as square as it can be."""
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
    """One of so many parts of rows ``(examples, positions, groups, d)``, as ``(1, rows, groups, d)``."""
    if parts == 1:
        return rows
    return torch.cat([rows[j::parts, j::parts].flatten(0, 1) for j in range(parts)]).unsqueeze(0)
