r"""How far a factor has moved, without keeping what it was: a sketch of a few columns stands for it.

With :math:`\Omega` of independent signs, :math:`E\|M\Omega\|_F^2 = k\|M\|_F^2` for k columns and any matrix M
(Hutchinson 1990), so that the norm of the difference of two sketches estimates that of the factors. The standard
deviation of the estimate of :math:`\|M\|_F^2` is at most :math:`\sqrt{2/k}` of it, whatever the dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Columns of a sketch. A factor of no more dimensions, or a diagonal, is its own sketch, and nothing is estimated.
COLUMNS = 16

#: The same signs in every run, on every rank and at every time: none of the run's random numbers are used up.
SEED = 1990


def signs(dimensions: int, like: Tensor) -> Tensor:
    """The columns of +1 and -1, shape ``(dimensions, COLUMNS)``, as a function of the dimensions alone."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(0, 2, (dimensions, COLUMNS), generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)


def sketch(factor: Tensor) -> Tensor:
    r"""What is kept of a factor: :math:`F\Omega`, a new tensor.

    Args:
        factor: Shape ``(groups, d, d)``, or ``(groups, d)`` if diagonal.

    Returns:
        Shape ``(groups, d, COLUMNS)``; the factor itself where that is no larger.
    """
    if sketch_shape(tuple(factor.shape)) == tuple(factor.shape):
        return factor.clone()
    return factor @ signs(factor.shape[-1], factor)


def sketch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the sketch of a factor of this shape."""
    return (*shape[:2], COLUMNS) if len(shape) == 3 and shape[-1] > COLUMNS else shape


def relative_change(new: Tensor, old: Tensor) -> float:
    r"""An estimate of :math:`\|F_{new} - F_{old}\|_F / \|F_{old}\|_F` from sketches; the largest of all groups.

    Infinite where a group was zero and is not any more; NaN where either sketch is not finite.
    """
    difference = torch.linalg.vector_norm((new - old).flatten(1), dim=1)
    size = torch.linalg.vector_norm(old.flatten(1), dim=1)
    # A unit that is dead, and stays so, has not moved.
    return float(torch.where(difference == 0, torch.zeros_like(size), difference / size).max())


def largest_change(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float:
    """The largest relative change of the factors by name; infinite where they are not the same ones, NaN as above."""
    if new.keys() != old.keys() or any(new[name].shape != old[name].shape for name in new):
        return float("inf")
    changes = [relative_change(new[name], old[name]) for name in new]
    # max() of Python would lose a NaN that is not the first.
    return float(torch.tensor(changes, dtype=torch.float64).max()) if changes else float("inf")
