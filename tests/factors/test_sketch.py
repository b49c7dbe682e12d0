"""Sketches: how far a factor has moved, estimated from a few columns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.factors.sketch import COLUMNS, largest_change, relative_change, signs, sketch, sketch_shape
from tests.factors.test_inverse import psd
from tests.nets import data


def exact(new: Tensor, old: Tensor) -> float:
    """The largest relative Frobenius change of a group."""
    changes = torch.linalg.vector_norm((new - old).flatten(1), dim=1) / torch.linalg.vector_norm(old.flatten(1), dim=1)
    return float(changes.max())


def random_symmetric(groups: int, d: int, rank: int, seed: int) -> Tensor:
    left = data(groups, d, rank, seed=seed)
    return left @ torch.diag(data(rank, seed=seed + 1)) @ left.mT


@given(
    groups=st.integers(1, 3),
    d=st.integers(COLUMNS + 1, 90),
    rank=st.integers(1, 90),
    size=st.floats(1e-3, 3.0),
    seed=st.integers(0, 10_000),
)
def test_the_change_of_sketches_estimates_that_of_factors(
    groups: int, d: int, rank: int, size: float, seed: int
) -> None:
    old = psd(groups, d, seed)
    change = random_symmetric(groups, d, min(rank, d), seed + 1)
    new = old + size * change * old.norm() / change.norm()
    # Each squared norm has a standard deviation of at most sqrt(2 / 16) = 0.35 of it: a factor of two is five of them
    # below for the numerator, and far more above for the ratio of a nearly full spectrum.
    found, wanted = relative_change(sketch(new), sketch(old)), exact(new, old)
    assert 0.4 < found / wanted < 2.5, f"{found} is {found / wanted:.2f} times {wanted}"


def test_the_squared_norm_is_estimated_without_bias_and_with_the_stated_spread() -> None:
    # Over matrices, the signs being fixed: a rotation by random signs of its own makes each an independent draw.
    M = random_symmetric(1, 40, 7, 3)
    flips = torch.randint(0, 2, (20_000, 1, 40), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    ratios = torch.stack([sketch(M * f.unsqueeze(-1) * f.unsqueeze(-2)).square().sum() for f in flips[:4000]])
    ratios = ratios / COLUMNS / M.square().sum()
    spread = float(ratios.std())
    print(f"mean {float(ratios.mean()):.4f}, standard deviation {spread:.3f}")
    assert abs(float(ratios.mean()) - 1) < 4 * spread / math.sqrt(4000)
    assert spread < math.sqrt(2 / COLUMNS)


@given(groups=st.integers(1, 4), d=st.integers(1, COLUMNS), diagonal=st.booleans(), seed=st.integers(0, 100))
def test_small_factors_and_diagonals_are_compared_exactly(groups: int, d: int, diagonal: bool, seed: int) -> None:
    shape = (groups, d + 30) if diagonal else (groups, d, d)
    old, new = data(*shape, seed=seed), data(*shape, seed=seed + 1)
    assert relative_change(sketch(new), sketch(old)) == pytest.approx(exact(new, old), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 17, 17), (1, 200), (3, 5)])
def test_the_shape_is_known_before(shape: tuple[int, ...]) -> None:
    found = sketch(data(*shape))
    assert tuple(found.shape) == sketch_shape(shape)
    assert found.numel() <= data(*shape).numel()


def test_signs_are_the_same_always_and_use_up_no_random_numbers() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = signs(50, torch.ones(1, dtype=torch.float64))
    torch.manual_seed(7)
    assert torch.equal(first, signs(50, torch.ones(1, dtype=torch.float64)))
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    torch.manual_seed(1)
    signs(50, torch.ones(1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_sketch_does_not_follow_its_factor() -> None:
    factor = data(1, 4, 4)
    kept = sketch(factor)
    factor.zero_()
    assert bool(kept.any())


@pytest.mark.parametrize("d", [8, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["new", "old", "both"])
def test_what_is_not_finite_is_never_at_rest(d: int, bad: float, where: str) -> None:
    old, new = psd(2, d, 1), psd(2, d, 1)
    if where != "old":
        new[1, 0, 0] = bad
    if where != "new":
        old[1, 0, 0] = bad
    change = largest_change(
        {"A": sketch(new), "G": sketch(psd(1, 3, 1))}, {"A": sketch(old), "G": sketch(psd(1, 3, 1))}
    )
    assert not change <= 1e300


def test_a_dead_unit_is_at_rest_until_it_lives() -> None:
    dead = torch.zeros(2, 20, 20, dtype=torch.float64)
    dead[0] = psd(1, 20, 1)[0]
    assert relative_change(sketch(dead), sketch(dead)) == 0
    alive = dead.clone()
    alive[1, 3, 3] = 1e-12
    assert relative_change(sketch(alive), sketch(dead)) == math.inf


def test_other_factors_are_infinitely_far() -> None:
    one = {"A": sketch(psd(1, 3, 1))}
    for other in ({}, {"F": one["A"]}, {"A": sketch(psd(1, 4, 1))}):
        assert largest_change(one, other) == math.inf
