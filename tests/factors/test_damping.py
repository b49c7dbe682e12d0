"""Factored Tikhonov damping (E4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.factors.damping import (
    LARGEST_DAMPING,
    LARGEST_NOISE_DAMPING,
    LEAST_DAMPING,
    inputs_per_row,
    split_damping,
    within_curvature,
)
from tests.helpers import oracles
from tests.helpers.nets import data


def psd(groups: int, d: int, seed: int, scale: float = 1.0) -> Tensor:
    """Positive semi-definite matrices of full or lower rank."""
    rows = data(groups, d, d, seed=seed)
    return scale * rows @ rows.transpose(1, 2)


@given(
    groups=st.integers(1, 3),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 5),
    damping=st.sampled_from([1e-8, 1e-2, 30.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_damping_is_split_by_the_ratio_of_mean_diagonals_in_each_group(
    groups: int, d_in: int, d_out: int, damping: float, scale: float
) -> None:
    A, G = psd(groups, d_in, 1), psd(groups, d_out, 2, scale)
    A_damped, G_damped = split_damping(A, G, damping)
    for g in range(groups):
        A_expected, G_expected = oracles.pi_damped(A[g], G[g], damping)
        oracles.assert_equal(A_damped[g], A_expected, what="A")
        oracles.assert_equal(G_damped[g], G_expected, what="G")


@given(scale=st.sampled_from([1e-6, 0.3, 1e5]), damping=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_moving_scale_between_the_factors_does_not_change_the_damped_product(scale: float, damping: float) -> None:
    A, G = psd(1, 3, 1), psd(1, 4, 2)
    A_one, G_one = split_damping(A, G, damping)
    A_two, G_two = split_damping(A * scale, G / scale, damping)
    oracles.assert_equal(oracles.kron(A_two[0], G_two[0]), oracles.kron(A_one[0], G_one[0]), what="A_λ⊗G_λ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("zero_A", "zero_G"), [(True, False), (False, True), (True, True)])
def test_a_dead_layer_is_damped_by_the_root_on_both_sides(zero_A: bool, zero_G: bool, dtype: torch.dtype) -> None:
    A = (psd(1, 3, 1) * (not zero_A)).to(dtype)
    G = (psd(1, 2, 2) * (not zero_G)).to(dtype)
    A_damped, G_damped = split_damping(A, G, 0.04)
    oracles.assert_equal(A_damped, A + 0.2 * torch.eye(3, dtype=dtype), rtol=1e-6, what="A")
    oracles.assert_equal(G_damped, G + 0.2 * torch.eye(2, dtype=dtype), rtol=1e-6, what="G")


def test_one_dead_group_does_not_touch_the_others() -> None:
    A, G = psd(2, 3, 1), psd(2, 2, 2)
    G[0] = 0
    A_damped, G_damped = split_damping(A, G, 0.04)
    A_expected, G_expected = oracles.pi_damped(A[1], G[1], 0.04)
    oracles.assert_equal(A_damped[1], A_expected, what="A")
    oracles.assert_equal(G_damped[1], G_expected, what="G")
    oracles.assert_equal(G_damped[0], 0.2 * torch.eye(2).double(), what="G of the dead group")


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_the_split_holds_to_the_ends_of_float32(size: float) -> None:
    # 1e-42 is a subnormal number, whose ratio to 1 overflows although its root's does not; it has 3 digits.
    A, G = psd(1, 3, 1).float(), (psd(1, 2, 2) * size).float()
    A_damped, G_damped = split_damping(A, G, 1e-2)
    A_expected, G_expected = oracles.pi_damped(A[0].double(), G[0].double(), 1e-2)
    oracles.assert_equal(A_damped[0].double(), A_expected, rtol=1e-2, what="A")
    oracles.assert_equal(G_damped[0].double(), G_expected, rtol=1e-2, what="G")


def test_a_diagonal_factor_is_damped_as_the_dense_one_it_stands_for() -> None:
    entries, G = data(1, 4).abs(), psd(1, 3, 2)
    A_dense, G_dense = split_damping(torch.diag_embed(entries), G, 0.01)
    A_diagonal, G_diagonal = split_damping(entries, G, 0.01)
    oracles.assert_equal(torch.diag_embed(A_diagonal), A_dense, what="A")
    oracles.assert_equal(G_diagonal, G_dense, what="G")


def test_the_factors_given_are_not_changed() -> None:
    A, G = psd(1, 3, 1), psd(1, 2, 2)
    before = A.clone(), G.clone()
    split_damping(A, G, 1.0)
    assert torch.equal(A, before[0])
    assert torch.equal(G, before[1])


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_that_is_not_positive_is_an_error(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping must be positive, got {damping!r}"):
        split_damping(psd(1, 2, 1), psd(1, 2, 2), damping)


@given(
    size=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e9]),
    damping=st.sampled_from([0.0, 1e-9, 1e-3, 1e6]),
    noise_damping=st.sampled_from([0.0, 1e-2, 1e6]),
    groups=st.integers(1, 3),
)
def test_an_automatic_damping_is_within_multiples_of_the_mean_curvature(
    size: float, damping: float, noise_damping: float, groups: int
) -> None:
    factors = {"A": psd(groups, 4, seed=1, scale=size), "G": psd(groups, 3, seed=2)}
    dense = torch.block_diag(*(torch.kron(A, G) for A, G in zip(factors["A"], factors["G"], strict=True)))
    mean, found = float(dense.diagonal().mean()), within_curvature(damping, noise_damping, factors)
    assert found > 0
    if mean == 0:
        assert found == pytest.approx(damping, abs=1e-37)
    else:
        least = max(LEAST_DAMPING * mean, min(noise_damping, LARGEST_NOISE_DAMPING * mean))
        assert found == pytest.approx(min(max(damping, least), LARGEST_DAMPING * mean))


def test_inputs_count_for_each_row_of_a_dense_factor_alone() -> None:
    dense, diagonal = {"A": psd(2, 6, 1), "G": psd(2, 3, 2)}, {"A": torch.ones(1, 6), "G": psd(1, 3, 2)}
    assert inputs_per_row(dense, 24) == 0.25
    assert inputs_per_row(dense, None) == inputs_per_row(diagonal, 24) == inputs_per_row({"F": psd(1, 6, 1)}, 24) == 0
