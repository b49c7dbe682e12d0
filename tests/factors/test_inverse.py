"""The solve E5, and what happens where a factor will not factorise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.factors.inverses import INVERSES, FactorisationError
from tests.helpers import oracles
from tests.helpers.nets import data

CHOLESKY = INVERSES["cholesky"]


def psd(groups: int, d: int, seed: int, rank: int | None = None) -> Tensor:
    rows = data(groups, d, rank or d, seed=seed)
    return rows @ rows.transpose(1, 2)


@given(
    groups=st.integers(1, 3),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 5),
    damping=st.sampled_from([1e-4, 1e-2, 10.0]),
    rank=st.integers(1, 5),
)
def test_cholesky_solve_equals_the_dense_solve_of_the_damped_product(
    groups: int, d_in: int, d_out: int, damping: float, rank: int
) -> None:
    A, G, gradient = psd(groups, d_in, 1, rank), psd(groups, d_out, 2, rank), data(groups, d_out, d_in, seed=3)
    found = CHOLESKY.factorise({"A": A, "G": G}, damping).solve(gradient)
    for g in range(groups):
        A_damped, G_damped = oracles.pi_damped(A[g], G[g], damping)
        oracles.assert_equal(found[g], oracles.dense_solve(A_damped, G_damped, gradient[g]), what=f"V of group {g}")


def test_a_singular_factor_in_float32_is_inverted_in_double_precision() -> None:
    # Rank 2 of 40, whole numbers, so that A itself is exact; damped below float32's resolution of its entries.
    rows = (100 * data(1, 40, 2)).round()
    A, G = (rows @ rows.transpose(1, 2)).float(), psd(1, 3, 2).float()
    gradient, damping = data(1, 3, 40, seed=3).float(), 1e-12
    A_damped, G_damped = oracles.pi_damped(A[0].double(), G[0].double(), damping)
    _, fails = torch.linalg.cholesky_ex(A_damped.float())
    assert bool(fails), "the case must fail in float32, or it shows nothing"
    V = CHOLESKY.factorise({"A": A, "G": G}, damping).solve(gradient)
    assert V.dtype == torch.float32
    oracles.assert_equal(
        V[0].double(), oracles.dense_solve(A_damped, G_damped, gradient[0].double()), rtol=1e-4, what="V"
    )


def test_a_factor_that_is_indefinite_by_more_than_rounding_gets_more_damping() -> None:
    A, G = torch.diag(torch.tensor([1.0, 1.0, -0.05]).double()).unsqueeze(0), torch.eye(2).double().unsqueeze(0)
    inverse = CHOLESKY.factorise({"A": A, "G": G}, 1e-4)
    # 1e-4 damps the smallest entry by 0.008, ten times that by 0.025, a hundred times by 0.08: positive.
    A_damped, G_damped = oracles.pi_damped(A[0], G[0], 1e-2)
    gradient = data(1, 2, 3)
    oracles.assert_equal(inverse.solve(gradient)[0], oracles.dense_solve(A_damped, G_damped, gradient[0]), what="V")


@pytest.mark.parametrize("bad", [float("nan"), -1e9])
def test_a_factor_without_an_inverse_is_an_error_that_names_the_dampings_tried(bad: float) -> None:
    A = torch.eye(3).double().unsqueeze(0)
    A[0, 0, 0] = bad
    with pytest.raises(FactorisationError, match=r"damping 0\.01 to 10"):
        CHOLESKY.factorise({"A": A, "G": torch.eye(2).double().unsqueeze(0)}, 0.01)


def test_the_state_of_an_inverse_makes_the_same_inverse() -> None:
    inverse = CHOLESKY.factorise({"A": psd(2, 3, 1), "G": psd(2, 2, 2)}, 0.01)
    gradient = data(2, 2, 3)
    assert torch.equal(CHOLESKY(**inverse.state()).solve(gradient), inverse.solve(gradient))
    # 2 groups of a 3x3 and a 2x2 matrix, 8 bytes a number.
    assert inverse.nbytes() == 2 * (9 + 4) * 8
