"""Inverses in the eigenbasis: E6 is the damped product itself, EKFAC the diagonal given to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.factors.eigenbasis import Eigenbasis, moments_in_basis, moments_of_gradients, moments_of_rows
from lightning_kfc.factors.inverses import (
    INVERSES,
    CholeskyInverse,
    DiagonalInverse,
    EighInverse,
    EkfacInverse,
    FactorisationError,
)
from lightning_kfc.factors.statistics import second_moment_diagonal, second_moment_total
from tests.helpers import oracles
from tests.helpers.nets import data

GROUPS, DIMS, POSITIONS = st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)
DAMPINGS = st.sampled_from([1e-6, 1e-2, 10.0])


def psd(groups: int, d: int, seed: int, rank: int | None = None, *, diagonal: bool = False) -> Tensor:
    rows = data(groups, d, rank or d, seed=seed)
    return rows.square().sum(-1) if diagonal else rows @ rows.mT


def dense(factor: Tensor) -> Tensor:
    """One group's factor as a matrix."""
    return torch.diag(factor) if factor.ndim == 1 else factor


def basis_matrix(basis: Eigenbasis, group: int) -> Tensor:
    """The columns of the basis on row-major vectors of a (d_out, d_in) matrix."""
    sides = [torch.eye(s.shape[1]).to(s) if s.ndim == 2 else s[group] for s in (basis.A_vectors, basis.G_vectors)]
    # torch.kron takes no matrix in column order.
    return oracles.kron(*(side.contiguous() for side in sides))


def random_basis(groups: int, d_out: int, d_in: int, seed: int) -> Eigenbasis:
    A, G = psd(groups, d_in, seed), psd(groups, d_out, seed + 1)
    return Eigenbasis(torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1])


@given(
    groups=GROUPS,
    d_in=DIMS,
    d_out=DIMS,
    rank=DIMS,
    damping=DAMPINGS,
    diagonal=st.tuples(st.booleans(), st.booleans()),
    kind=st.sampled_from(["eigh", "ekfac"]),
)
def test_the_solve_in_the_eigenbasis_is_the_dense_solve_with_exact_damping(
    groups: int, d_in: int, d_out: int, rank: int, damping: float, diagonal: tuple[bool, bool], kind: str
) -> None:
    A = psd(groups, d_in, 1, rank, diagonal=diagonal[0])
    G = psd(groups, d_out, 2, rank, diagonal=diagonal[1])
    gradient = data(groups, d_out, d_in, seed=3)
    found = INVERSES[kind].factorise({"A": A, "G": G}, damping).solve(gradient)
    for g in range(groups):
        F = oracles.kron(dense(A[g]), dense(G[g]))
        expected = torch.linalg.solve(F + damping * torch.eye(len(F)).double(), gradient[g].reshape(-1))
        # The null space of a rank-deficient F is as large as 1 / damping, and known to that times the rounding.
        oracles.assert_equal(found[g].reshape(-1), expected, rtol=1e-6, what=f"V of group {g}")


@given(groups=GROUPS, d_in=DIMS, d_out=DIMS, damping=DAMPINGS, diagonal=st.sampled_from([(0, 1), (1, 0), (1, 1)]))
def test_cholesky_with_diagonal_factors_is_the_dense_solve_of_the_split_damping(
    groups: int, d_in: int, d_out: int, damping: float, diagonal: tuple[int, int]
) -> None:
    A = psd(groups, d_in, 1, diagonal=bool(diagonal[0]))
    G = psd(groups, d_out, 2, diagonal=bool(diagonal[1]))
    gradient = data(groups, d_out, d_in, seed=3)
    found = CholeskyInverse.factorise({"A": A, "G": G}, damping).solve(gradient)
    for g in range(groups):
        damped = oracles.pi_damped(dense(A[g]), dense(G[g]), damping)
        oracles.assert_equal(found[g], oracles.dense_solve(*damped, gradient[g]), what=f"V of group {g}")


@given(examples=st.integers(1, 4), positions=POSITIONS, groups=GROUPS, d_in=DIMS, d_out=DIMS, in_rows=st.booleans())
def test_projected_second_moments_are_the_diagonal_of_the_dense_sum_of_outer_products(
    examples: int, positions: int, groups: int, d_in: int, d_out: int, in_rows: bool
) -> None:
    a, g = data(examples, positions, groups, d_in, seed=1), data(examples, positions, groups, d_out, seed=2)
    basis = random_basis(groups, d_out, d_in, seed=3)
    gradients = torch.stack([
        torch.stack([sum(torch.outer(g[n, t, k], a[n, t, k]) for t in range(positions)) for k in range(groups)])
        for n in range(examples)
    ])  # fmt: skip
    found = moments_of_rows(a, g, basis) if in_rows else moments_of_gradients(gradients, basis)
    for k in range(groups):
        vectors = gradients[:, k].reshape(examples, -1)
        Q = basis_matrix(basis, k)
        expected = (Q.T @ (vectors.T @ vectors) @ Q).diagonal()
        oracles.assert_equal(found[k].reshape(-1), expected, what="second moments")


@given(groups=GROUPS, d_in=DIMS, d_out=DIMS, diagonal=st.tuples(st.booleans(), st.booleans()))
def test_a_change_of_basis_keeps_the_diagonal_of_the_matrix_that_the_moments_stand_for(
    groups: int, d_in: int, d_out: int, diagonal: tuple[bool, bool]
) -> None:
    def inverse(seed: int) -> EkfacInverse:
        A, G = psd(groups, d_in, seed, diagonal=diagonal[0]), psd(groups, d_out, seed + 1, diagonal=diagonal[1])
        return EkfacInverse.factorise({"A": A, "G": G}, 0.1)

    moments = data(groups, d_out, d_in, seed=9).square()
    old, fresh = inverse(1).updated(moments, 0.9), inverse(5)
    new = fresh.continuing_from(old)
    assert isinstance(new, EkfacInverse)
    assert new.weight == old.weight == pytest.approx(0.1)
    assert fresh.continuing_from(inverse(1)) is fresh, "eigenvalues that no example stands behind are not carried over"
    oracles.assert_equal(new.values, moments_in_basis(moments, old.basis, new.basis), what="carried moments")
    for k in range(groups):
        Q_old, Q_new = basis_matrix(old.basis, k), basis_matrix(new.basis, k)
        expected = (Q_new.T @ Q_old @ torch.diag(moments[k].reshape(-1)) @ Q_old.T @ Q_new).diagonal()
        oracles.assert_equal(new.values[k].reshape(-1), expected, what="carried moments")


@given(kind=st.sampled_from(["cholesky", "eigh", "ekfac"]), shape=st.sampled_from([(1, 1, 1), (3, 1, 2), (2, 4, 1)]))
def test_the_state_of_an_inverse_makes_the_same_inverse(kind: str, shape: tuple[int, int, int]) -> None:
    groups, d_out, d_in = shape
    inverse = INVERSES[kind].factorise({"A": psd(groups, d_in, 1), "G": psd(groups, d_out, 2)}, 0.01)
    gradient = data(*shape)
    assert torch.equal(INVERSES[kind](**inverse.state()).solve(gradient), inverse.solve(gradient))
    assert all(isinstance(value, Tensor | float) for value in inverse.state().values())


@pytest.mark.parametrize("kind", ["eigh", "ekfac"])
def test_another_damping_needs_no_other_factorisation(kind: str) -> None:
    factors, gradient = {"A": psd(1, 3, 1), "G": psd(1, 2, 2)}, data(1, 2, 3)
    again = INVERSES[kind].factorise(factors, 0.5).with_damping(0.01)
    F = oracles.kron(factors["A"][0], factors["G"][0])
    expected = torch.linalg.solve(F + 0.01 * torch.eye(6).double(), gradient.reshape(-1))
    oracles.assert_equal(again.solve(gradient).reshape(-1), expected, what="V")


@pytest.mark.parametrize("kind", list(INVERSES))
@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_a_damping_that_is_not_positive_is_an_error(kind: str, damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be positive"):
        INVERSES[kind].factorise({"A": psd(1, 3, 1), "G": psd(1, 2, 2)}, damping)


@pytest.mark.parametrize("kind", list(INVERSES))
@pytest.mark.parametrize("side", ["A", "G"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_a_factorisation_error(kind: str, side: str, diagonal: bool, bad: float) -> None:
    factors = {"A": psd(2, 3, 1, diagonal=diagonal), "G": psd(2, 2, 2, diagonal=diagonal)}
    factors[side][(1,) * factors[side].ndim] = bad
    with pytest.raises(FactorisationError):
        INVERSES[kind].factorise(factors, 0.01)


@given(
    kind=st.sampled_from(list(INVERSES)),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    rank=st.integers(0, 3),
    scales=st.tuples(st.sampled_from([1e-12, 1e-4, 1.0, 1e4, 1e12]), st.sampled_from([1e-12, 1e-4, 1.0, 1e4, 1e12])),
    relative=st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_rank_deficient_float32_factors_of_any_scale_are_solved_as_in_double_precision(
    kind: str, d_in: int, d_out: int, rank: int, scales: tuple[float, float], relative: float
) -> None:
    A = (psd(1, d_in, 1, rank or None) * (scales[0] if rank else 0)).float()
    G = (psd(1, d_out, 2, rank or None) * (scales[1] if rank else 0)).float()
    damping = relative * scales[0] * scales[1]
    assume(1e-30 < damping < 1e30)
    gradient = data(1, d_out, d_in, seed=3).float()
    found = INVERSES[kind].factorise({"A": A, "G": G}, damping).solve(gradient).double()
    exact = INVERSES[kind].factorise({"A": A.double(), "G": G.double()}, damping).solve(gradient.double())
    # Rounding of the factors moves the solution by eps * largest eigenvalue / damping, E4 by the root of that.
    assert bool(torch.isfinite(found).all())
    assert float((found * gradient).sum()) > 0, "V must stay a direction of descent"
    error = float((found - exact).norm() / exact.norm())
    largest = float(torch.linalg.matrix_norm(A.double(), 2).max() * torch.linalg.matrix_norm(G.double(), 2).max())
    allowed = 100 * torch.finfo(torch.float32).eps * (1 + largest / damping)
    assert error <= max(allowed, 1e-5), f"relative error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("kind", ["eigh", "ekfac"])
def test_rounding_of_a_singular_factor_makes_no_direction_of_negative_curvature(kind: str) -> None:
    A, G = (1e4 * psd(1, 40, 1, rank=2)).float(), psd(1, 3, 2).float()
    assert float(torch.linalg.eigvalsh(A).min()) < -1e-4, "the case must be indefinite, or it shows nothing"
    inverse = INVERSES[kind].factorise({"A": A, "G": G}, 1e-6)
    gradient = data(1, 3, 40, seed=3).float()
    assert float((inverse.solve(gradient) * gradient).sum()) > 0


@pytest.mark.parametrize("kind", list(INVERSES))
def test_zero_factors_give_the_gradient_over_the_damping(kind: str) -> None:
    factors = {"A": torch.zeros(1, 3, 3), "G": torch.zeros(1, 2, 2)}
    gradient = data(1, 2, 3).float()
    oracles.assert_equal(INVERSES[kind].factorise(factors, 0.25).solve(gradient), gradient / 0.25, rtol=1e-6, what="V")


def test_a_decomposition_that_fails_in_single_precision_is_taken_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, seen = torch.linalg.eigh, []

    def fails_in_single(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    factors, gradient = {"A": psd(1, 3, 1).float(), "G": psd(1, 2, 2).float()}, data(1, 2, 3).float()
    found = EighInverse.factorise(factors, 0.1).solve(gradient)
    assert seen == [torch.float32, torch.float64] * 2
    assert found.dtype == torch.float32
    F = oracles.kron(factors["A"][0], factors["G"][0])
    expected = torch.linalg.solve(F + 0.1 * torch.eye(6), gradient.reshape(-1))
    oracles.assert_equal(found.reshape(-1), expected, rtol=1e-4, what="V")


@given(examples=st.integers(1, 3), positions=POSITIONS, groups=GROUPS, d=DIMS)
def test_the_diagonal_of_a_second_moment_needs_no_matrix(examples: int, positions: int, groups: int, d: int) -> None:
    rows = data(examples, positions, groups, d)
    expected = second_moment_total(rows).diagonal(dim1=-2, dim2=-1)
    oracles.assert_equal(second_moment_diagonal(rows), expected, what="diagonal")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_plain_diagonal_that_is_not_finite_or_negative_is_a_factorisation_error(bad: float) -> None:
    with pytest.raises(FactorisationError, match="not finite, or negative"):
        DiagonalInverse.factorise({"F": torch.tensor([[1.0, bad]])}, 0.01)
