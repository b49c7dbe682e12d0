"""The paper's step: E5 for every layer, then the KL clip E7 over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.factors.inverses import INVERSES, Inverse
from lightning_kfc.rules.natural import natural_step
from tests.helpers import oracles
from tests.helpers.nets import data


def layers(count: int) -> tuple[list[Tensor], list[Inverse], list[Tensor]]:
    """Gradients, inverses and the updates that E5 makes by a dense solve."""
    gradients, inverses, updates = [], [], []
    for i in range(count):
        d_out, d_in = 2 + i, 3
        a, g = data(d_in, d_in, seed=10 + i), data(d_out, d_out, seed=20 + i)
        A, G = a @ a.T, g @ g.T
        gradient = data(d_out, d_in, seed=30 + i)
        gradients.append(gradient.unsqueeze(0))
        inverses.append(INVERSES["cholesky"].factorise({"A": A.unsqueeze(0), "G": G.unsqueeze(0)}, 0.1))
        updates.append(oracles.dense_solve(*oracles.pi_damped(A, G, 0.1), gradient))
    return gradients, inverses, updates


@given(
    rates=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 2.0]), min_size=1, max_size=3),
    kappa=st.sampled_from([1e-4, 1e-2, 1.0, 1e6]),
)
def test_all_updates_are_scaled_by_the_one_factor_of_the_clip_with_each_layer_s_own_rate(
    rates: list[float], kappa: float
) -> None:
    gradients, inverses, updates = layers(len(rates))
    expected = oracles.clip_factor(updates, [g[0] for g in gradients], rates, kappa)
    step = natural_step(gradients, inverses, rates, kappa)
    assert math.isclose(step.clip, expected, rel_tol=1e-9), f"clip {step.clip}, expected {expected}"
    for found, update in zip(step.tensors, updates, strict=True):
        oracles.assert_equal(found[0], expected * update, what="update")


def test_a_clipped_step_has_the_squared_length_of_the_bound_in_the_fisher_metric() -> None:
    gradients, inverses, _ = layers(3)
    rates, kappa = [0.5, 1.0, 2.0], 1e-3
    step = natural_step(gradients, inverses, rates, kappa)
    assert step.clip < 1
    # Undamped, F V is the gradient: the squared length of a step is rate² clip² (V, gradient), V the unclipped update.
    length = sum(
        rate**2 * step.clip * float((update * gradient).sum())
        for rate, update, gradient in zip(rates, step.tensors, gradients, strict=True)
    )
    assert math.isclose(length, kappa, rel_tol=1e-9), f"ratio {length / kappa:.6g}"


def test_without_a_clip_updates_are_those_of_the_solve() -> None:
    gradients, inverses, updates = layers(2)
    step = natural_step(gradients, inverses, [1e3, 1e3], None)
    assert step.clip == 1
    for found, update in zip(step.tensors, updates, strict=True):
        oracles.assert_equal(found[0], update, what="update")


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_zero_gradient_or_a_zero_rate_is_not_clipped(rate: float) -> None:
    gradients, inverses, _ = layers(1)
    gradients = [gradients[0] * rate]
    step = natural_step(gradients, inverses, [1.0 - rate], 1e-9)
    assert step.clip == 1
    assert step.quadratic == 0


@pytest.mark.parametrize("spoilt", [-1.0, math.inf, math.nan])
def test_an_update_that_climbs_or_is_not_finite_gives_way_to_the_fallback_then_to_the_gradient(spoilt: float) -> None:
    # Only an inverse that rounding has made indefinite gives a negative product.
    gradients, inverses, updates = layers(2)
    bad = INVERSES["cholesky"](spoilt * torch.eye(3).double().unsqueeze(0), torch.eye(2).double().unsqueeze(0))
    worse = INVERSES["cholesky"](bad.A_inverse, torch.eye(3).double().unsqueeze(0))
    step = natural_step(gradients, [bad, worse], [1.0, 1.0], None, [inverses[0], None])
    assert step.restored == (0,)
    assert step.failed == (1,)
    oracles.assert_equal(step.tensors[0][0], updates[0], what="update")
    assert torch.equal(step.tensors[1], gradients[1])
    assert step.clip == 1


def test_a_product_that_overflows_float32_does_not_condemn_an_update_that_does_not() -> None:
    gradient = torch.full((1, 2, 3), 1e25)
    inverse = INVERSES["cholesky"](torch.eye(3).unsqueeze(0), torch.eye(2).unsqueeze(0))
    step = natural_step([gradient], [inverse], [1.0], None)
    assert step.failed == ()
    assert math.isclose(step.quadratic, 6e50, rel_tol=1e-5)


def test_no_layers_make_no_updates() -> None:
    step = natural_step([], [], [], 0.01)
    assert step.tensors == ()
    assert step.clip == 1


@pytest.mark.parametrize("kappa", [1e-4, None])
def test_a_layer_whose_update_is_not_finite_keeps_its_gradient_and_leaves_the_clip_to_the_others(
    kappa: float | None,
) -> None:
    gradients, inverses, updates = layers(2)
    broken = INVERSES["cholesky"](torch.full((1, 3, 3), float("inf")).double(), torch.eye(2).double().unsqueeze(0))
    step = natural_step(gradients, [broken, inverses[1]], [1.0, 1.0], kappa)
    expected = 1.0 if kappa is None else oracles.clip_factor(updates[1:], [gradients[1][0]], [1.0], kappa)
    assert step.failed == (0,)
    assert torch.equal(step.tensors[0], gradients[0])
    oracles.assert_equal(step.tensors[1][0], expected * updates[1], what="update")


@pytest.mark.parametrize("kappa", [None, 1e-3, 1e6])
@pytest.mark.parametrize("most", [1e-4, 1e-2, 1e6])
def test_a_step_promises_by_its_slope_no_more_than_it_may_and_is_else_as_long_as_the_clip_allows(
    kappa: float | None, most: float
) -> None:
    gradients, inverses, updates = layers(3)
    rates = [0.5, 1.0, 0.2]
    clipped = 1.0 if kappa is None else oracles.clip_factor(updates, [g[0] for g in gradients], rates, kappa)
    length = sum(
        rate**2 * float((update * gradient[0]).sum())
        for rate, update, gradient in zip(rates, updates, gradients, strict=True)
    )
    slope = sum(
        rate * float((update * gradient[0]).sum())
        for rate, update, gradient in zip(rates, updates, gradients, strict=True)
    )
    step = natural_step(gradients, inverses, rates, kappa, most_decrease=most)
    share = min(clipped, most / slope, 1.0)
    for found, update in zip(step.tensors, updates, strict=True):
        oracles.assert_equal(found[0], share * update, what="update")
    # The radius is held against the step that there would be without it.
    assert math.isclose(step.quadratic, length * min(most / slope, 1.0) ** 2, rel_tol=1e-9)
    assert math.isclose(step.clip, 1.0 if kappa is None else min(1.0, math.sqrt(kappa / step.quadratic)), rel_tol=1e-9)


@given(
    kappa=st.sampled_from([1e-4, 1e6]),
    bounds=st.lists(st.sampled_from([1e-3, 1e3, math.inf]), min_size=2, max_size=3),
)
def test_an_update_that_is_still_too_long_after_the_clip_is_shortened_and_the_others_stay(
    kappa: float, bounds: list[float]
) -> None:
    gradients, inverses, _ = layers(len(bounds))
    rates = [0.1] * len(bounds)
    free = natural_step(gradients, inverses, rates, kappa)
    bounded = natural_step(gradients, inverses, rates, kappa, largest=bounds)
    assert bounded.clip == free.clip
    assert bounded.quadratic == free.quadratic
    for update, before, bound in zip(bounded.tensors, free.tensors, bounds, strict=True):
        assert float(update.norm()) <= bound * (1 + 1e-12)
        torch.testing.assert_close(update, before * min(1.0, bound / float(before.norm())))
    slope = sum(0.1 * float((u * g).sum()) for u, g in zip(bounded.tensors, gradients, strict=True))
    assert bounded.slope == pytest.approx(slope)
