"""Zero-debiased running averages."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.factors.running_average import RunningAverage
from tests.helpers import oracles
from tests.helpers.nets import data


@given(decays=st.lists(st.sampled_from([0.0, 0.5, 0.95, 0.999]), min_size=1, max_size=8))
def test_running_average_is_the_debiased_exponential_one_also_where_the_decay_changes(decays: list[float]) -> None:
    values = [data(1, 3, 3, seed=i) for i in range(len(decays))]
    average = RunningAverage.start(values[0], decays[0])
    for value, decay in zip(values[1:], decays[1:], strict=True):
        average = average.updated(value, decay)
    oracles.assert_equal(average.value, oracles.running_average(values, decays), what="average")


@given(decay=st.sampled_from([0.0, 0.5, 0.95, 0.999]), updates=st.integers(1, 6))
def test_running_average_is_its_closed_form(decay: float, updates: int) -> None:
    values = [data(2, 2, seed=i) for i in range(updates)]
    average = RunningAverage.start(values[0], decay)
    for value in values[1:]:
        average = average.updated(value, decay)
    shares = [decay ** (updates - 1 - i) * (1 - decay) / (1 - decay**updates) for i in range(updates)]
    expected = torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)
    oracles.assert_equal(average.value, expected, what="average")
    assert abs(average.weight - (1 - decay**updates)) < 1e-12


def test_the_first_update_counts_fully() -> None:
    value = data(3, 3)
    assert torch.equal(RunningAverage.start(value, 0.99).value, value)


def test_an_average_of_equal_values_is_that_value() -> None:
    value = data(3, 3)
    average = RunningAverage.start(value, 0.9)
    for _ in range(20):
        average = average.updated(value, 0.9)
    oracles.assert_equal(average.value, value, rtol=1e-14, what="average")


def test_an_update_leaves_earlier_averages_as_they_were() -> None:
    first = RunningAverage.start(data(2, 2), 0.5)
    before = first.value.clone()
    first.updated(data(2, 2, seed=9), 0.5)
    assert torch.equal(first.value, before)
