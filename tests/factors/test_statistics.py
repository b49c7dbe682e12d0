"""Sums over rows and the factors made from them (E1, E2)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.factors.statistics import (
    Statistics,
    append_ones,
    homogeneous_total,
    per_example_gradients,
    second_moment_total,
)
from tests.helpers import oracles
from tests.helpers.nets import data


@given(examples=st.integers(0, 3), positions=st.integers(1, 3), groups=st.integers(1, 3), d=st.integers(1, 4))
def test_second_moment_total_is_the_sum_of_outer_products_in_each_group(
    examples: int, positions: int, groups: int, d: int
) -> None:
    rows = data(examples, positions, groups, d)
    expected = torch.zeros(groups, d, d).double()
    for n in range(examples):
        for t in range(positions):
            for g in range(groups):
                expected[g] += torch.outer(rows[n, t, g], rows[n, t, g])
    oracles.assert_equal(second_moment_total(rows), expected, what="total")


@given(examples=st.integers(1, 3), groups=st.integers(1, 2), d=st.integers(1, 4))
def test_bordering_a_total_equals_the_total_of_bordered_rows(examples: int, groups: int, d: int) -> None:
    rows = data(examples, 2, groups, d)
    found = homogeneous_total(second_moment_total(rows), rows.sum((0, 1)), 2 * examples)
    oracles.assert_equal(found, second_moment_total(append_ones(rows)), what="total")


def test_input_factor_is_a_mean_over_rows_and_output_factor_a_sum_over_calls_of_unequal_size() -> None:
    a, g = data(7, 1, 1, 3), data(7, 1, 1, 2, seed=4)
    parts = [
        Statistics({"A": second_moment_total(a[part])}, {"G": second_moment_total(g[part])}, len(a[part]))
        for part in (slice(0, 2), slice(2, 7))
    ]
    factors = (parts[0] + parts[1]).factors()
    rows, outputs = a.reshape(7, 3), g.reshape(7, 2)
    oracles.assert_equal(factors["A"][0], rows.T @ rows / 7, what="A")
    oracles.assert_equal(factors["G"][0], outputs.T @ outputs, what="G")


def test_statistics_with_a_number_that_is_not_finite_are_reported() -> None:
    good = Statistics({"A": torch.ones(1, 1, 1)}, {"G": torch.ones(1, 1, 1)}, 1)
    assert good.is_finite()
    for bad in (float("nan"), float("inf")):
        assert not Statistics({"A": torch.full((1, 1, 1), bad)}, good.sums, 1).is_finite()
        assert not Statistics(good.means, {"G": torch.full((1, 1, 1), bad)}, 1).is_finite()


def test_per_example_gradients_sum_each_example_s_own_rows() -> None:
    a, g = data(3, 2, 2, 4), data(3, 2, 2, 5, seed=4)
    expected = torch.stack(
        [torch.stack([sum(torch.outer(g[n, t, k], a[n, t, k]) for t in range(2)) for k in range(2)]) for n in range(3)]
    )
    oracles.assert_equal(per_example_gradients(a, g), expected, what="gradients")
