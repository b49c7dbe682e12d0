r"""E5 within the range of a gradient of low rank.

The gradient of a layer with R rows in a step has a rank of R at most. With an orthonormal basis Q of its range,
:math:`V = (G_\lambda^{-1} Q)\,(Q^\top \nabla\bar W A_\lambda^{-1})`. If R is small compared to the layer's widths, this
takes far fewer multiplications than the whole product. The product of the gradient with more than R columns of random
signs spans the range (Halko, Martinsson & Tropp 2011, algorithm 4.1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.factors.inverses.base import Inverse, StepInverse

#: Columns beyond the rank, so that every direction of the range is found accurately.
MORE_COLUMNS = 8

#: Largest share of the whole product's multiplications at which the range is used. Those of the decomposition count
#: twice, since they run at half the speed.
WORTHWHILE = 0.65

#: Largest relative part of a further random product outside the range: far above rounding, and far below the part of
#: one more row.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

#: The signs are the same in every call, so that a resumed run is equal.
SEED = 20090922


@dataclass(frozen=True)
class FewRows(StepInverse):
    """An inverse applied within the gradient's range; the whole product for a gradient of higher rank.

    Attributes:
        A_inverse: Shape ``(1, d_in, d_in)``.
        G_inverse: Shape ``(1, d_out, d_out)``.
        whole: The inverse for any gradient.
        rows: The number of rows R.
    """

    A_inverse: Tensor
    G_inverse: Tensor
    whole: Inverse
    rows: int

    def solve(self, gradient: Tensor) -> Tensor:
        """E5; see :class:`Inverse`."""
        update = self.solve_by_range(gradient)
        return self.whole.solve(gradient) if update is None else update

    def solve_by_range(self, gradient: Tensor) -> Tensor | None:
        """E5 within the gradient's range; None if the gradient has a rank above R."""
        matrix = gradient[0].to(self.A_inverse.dtype)
        signs = _signs(matrix.shape[1], self.rows + MORE_COLUMNS + 1, matrix.dtype)
        products = matrix @ signs
        basis, _ = torch.linalg.qr(products[:, :-1])
        probe = products[:, -1]
        left = probe - basis @ (basis.T @ probe)
        # Also for a gradient that is not finite: the whole product then has NaN, too.
        if not float(left.norm()) <= TOLERANCE[matrix.dtype] * float(probe.norm()):
            return None
        update: Tensor = (self.G_inverse[0] @ basis) @ (basis.T @ matrix @ self.A_inverse[0])
        return update.unsqueeze(0).to(gradient.dtype)


def pays(rows: int, d_out: int, d_in: int) -> bool:
    """Whether the solve within the range is cheaper for a gradient of this many rows."""
    columns = rows + MORE_COLUMNS + 1
    by_range = columns * (6 * d_out * d_in + 2 * (d_out**2 + d_in**2) + 8 * columns * d_out)
    return columns < min(d_out, d_in) and by_range <= WORTHWHILE * 2 * d_out * d_in * (d_out + d_in)


@functools.lru_cache(maxsize=64)
def _signs(dimensions: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return (torch.randint(0, 2, (dimensions, columns), generator=generator) * 2 - 1).to(dtype)
