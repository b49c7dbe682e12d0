r"""E5 for a gradient that is the sum of few rows' outer products, by way of its range.

A layer that reads R rows in a step has a gradient of rank R at most. With an orthonormal basis Q of its range,
:math:`V = (G_\lambda^{-1} Q)\,(Q^\top \nabla\bar W A_\lambda^{-1})`: where R is small against the layer's widths, that
takes far fewer multiplications than the whole product. The range is found by the gradient's product with random signs
(Halko, Martinsson & Tropp 2011, algorithm 4.1), which has all of it where there are more columns than R.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_kfc.factors.inverses.base import Inverse, StepInverse
from lightning_kfc.factors.products import aligned_empty

#: Columns beyond the rank: with as many as the rank itself, some direction may be caught badly.
MORE_COLUMNS = 8

#: The way by the range is taken where it needs at most this share of the whole product's multiplications. Those of the
#: decomposition are counted twice, since they run at half the speed.
WORTHWHILE = 0.65

#: What may be left of the gradient outside the range, relative, along a direction that has no part in finding it: far
#: more than rounding, and far less than what a row that was not reckoned with leaves.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

#: The signs are the same in every call, as a resumed run needs them.
SEED = 20090922


@dataclass(frozen=True)
class FewRows(StepInverse):
    """An inverse that is applied by way of the gradient's range; whole, where the gradient shows to be of higher rank.

    Attributes:
        A_inverse: Shape ``(1, d_in, d_in)``.
        G_inverse: Shape ``(1, d_out, d_out)``.
        whole: The inverse as it is.
        rows: The number of rows R.
    """

    A_inverse: Tensor
    G_inverse: Tensor
    whole: Inverse
    rows: int
    name: ClassVar[str] = "few rows"

    def solve(self, gradient: Tensor) -> Tensor:
        """E5; see :class:`Inverse`."""
        update = self.solve_by_range(gradient)
        return self.whole.solve(gradient) if update is None else update

    def solve_by_range(self, gradient: Tensor) -> Tensor | None:
        """E5 by way of the gradient's range; None where the gradient is of higher rank than R rows explain."""
        matrix = gradient[0].to(self.A_inverse.dtype)
        signs = _signs(matrix.shape[1], self.rows + MORE_COLUMNS + 1, matrix.dtype)
        products = matrix @ signs
        basis, _ = torch.linalg.qr(products[:, :-1])
        probe = products[:, -1]
        left = probe - basis @ (basis.T @ probe)
        # Also where the gradient is not finite: the whole product then holds NaN as well.
        if not float(left.norm()) <= TOLERANCE[matrix.dtype] * float(probe.norm()):
            return None
        half = torch.mm(basis.T @ matrix, self.A_inverse[0])
        update = torch.mm(self.G_inverse[0] @ basis, half, out=aligned_empty(matrix, *matrix.shape))
        return update.unsqueeze(0).to(gradient.dtype)


def pays(rows: int, d_out: int, d_in: int) -> bool:
    """Whether a gradient of so many rows is better preconditioned by way of its range."""
    columns = rows + MORE_COLUMNS + 1
    by_range = columns * (6 * d_out * d_in + 2 * (d_out**2 + d_in**2) + 8 * columns * d_out)
    return columns < min(d_out, d_in) and by_range <= WORTHWHILE * 2 * d_out * d_in * (d_out + d_in)


@functools.lru_cache(maxsize=64)
def _signs(dimensions: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return (torch.randint(0, 2, (dimensions, columns), generator=generator) * 2 - 1).to(dtype)
