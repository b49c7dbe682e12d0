"""Dates of refreshes, and values that change over the steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc import ExponentialSchedule, LinearSchedule
from lightning_kfc.scheduling.refresh_schedule import LATER_FROM, RefreshSchedule, value_at


def due(schedule: RefreshSchedule, until: int) -> tuple[list[int], list[int]]:
    steps = range(until)
    return [s for s in steps if schedule.factors_due(s)], [s for s in steps if schedule.inverses_due(s)]


def test_the_default_steps_are_those_of_the_design() -> None:
    factors, inverses = due(RefreshSchedule(), 61)
    assert factors == [*range(11), 20, 30, 40, 50, 60]
    assert inverses == [0, 1, 2, 3, 5, 7, 9, 10, 20, 40, 60]


@pytest.mark.parametrize(
    ("schedule", "factors", "inverses"),
    [
        (RefreshSchedule(1, 1, 0), list(range(12)), list(range(12))),
        (RefreshSchedule(4, 8, 0), [0, 4, 8], [0, 8]),
        (RefreshSchedule(4, 6, 1), [0, 4, 8], [0, 1, 6]),
        (RefreshSchedule(5, 5, 6), [0, 1, 2, 3, 4, 5, 10], [0, 1, 2, 3, 5, 6, 10]),
        (RefreshSchedule(100, 100, 3), [0, 1, 2], [0, 1, 2, 3]),
        (RefreshSchedule(1, 2, 6), list(range(12)), [0, 1, 2, 3, 4, 5, 6, 8, 10]),
    ],
)
def test_warm_up_then_the_two_periods(schedule: RefreshSchedule, factors: list[int], inverses: list[int]) -> None:
    assert due(schedule, 12) == (factors, inverses)


def test_from_step_100_on_the_periods_are_longer() -> None:
    factors, inverses = due(RefreshSchedule(later_periods=5), 301)
    assert factors[-8:] == [70, 80, 90, 100, 150, 200, 250, 300]
    assert inverses[-5:] == [60, 80, 100, 200, 300]


@given(
    factor=st.integers(1, 30),
    inverse=st.integers(1, 60),
    warmup=st.integers(0, 150),
    later=st.integers(1, 7),
    offset=st.integers(0, 59),
)
def test_the_last_date_is_found_as_by_going_through_all(
    factor: int, inverse: int, warmup: int, later: int, offset: int
) -> None:
    schedule, offset = RefreshSchedule(factor, inverse, warmup, later), offset % inverse
    last_factors = last_inverses = last_in_turn = 0
    for step in range(500):
        last_factors = step if schedule.factors_due(step) else last_factors
        last_inverses = step if schedule.inverses_due(step) else last_inverses
        every = inverse if step < LATER_FROM else inverse * later
        in_turn = schedule.inverses_due(step) if step < max(warmup, 1) else step % every == offset
        last_in_turn = step if in_turn else last_in_turn
        assert schedule.last_factors_due(step) == last_factors
        assert schedule.last_inverses_due(step) == last_inverses
        assert schedule.last_inverses_due(step, offset) == last_in_turn


@given(factor=st.integers(1, 30), inverse=st.integers(1, 30), warmup=st.integers(0, 30))
def test_the_first_step_takes_statistics_and_inverts_them(factor: int, inverse: int, warmup: int) -> None:
    schedule = RefreshSchedule(factor, inverse, warmup)
    assert schedule.factors_due(0)
    assert schedule.inverses_due(0)


@given(start=st.floats(1e-6, 1e3), end=st.floats(1e-6, 1e3), steps=st.integers(1, 50), step=st.integers(0, 100))
def test_schedules_start_and_end_where_promised_and_stay_between(
    start: float, end: float, steps: int, step: int
) -> None:
    share = min(step / steps, 1)
    exponential, linear = ExponentialSchedule(start, end, steps), LinearSchedule(start, end, steps)
    assert math.isclose(exponential(step), math.exp(math.log(start) + share * (math.log(end) - math.log(start))))
    assert math.isclose(linear(step), start + share * (end - start), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(linear(0), start)
    assert math.isclose(exponential(steps + 5), end)


def test_a_damping_is_a_number_a_schedule_or_any_function_of_the_step() -> None:
    assert value_at(0.5, 3) == 0.5
    assert value_at(LinearSchedule(1.0, 3.0, 4), 2) == 2.0
    assert value_at(lambda step: step / 2, 3) == 1.5


@pytest.mark.parametrize("schedule", [ExponentialSchedule, LinearSchedule])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 0.0, "end": 1.0, "steps": 5}, ValueError, "start must be a positive number, got 0.0"),
        ({"start": 1.0, "end": -1.0, "steps": 5}, ValueError, "end must be a positive number, got -1.0"),
        ({"start": 1.0, "end": 1.0, "steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"start": "1", "end": 1.0, "steps": 5}, TypeError, "start must be a number, got '1' of type str"),
        ({"start": 1.0, "end": 1.0, "steps": 2.5}, TypeError, "steps must be a whole number, got 2.5 of type float"),
    ],
)
def test_a_schedule_that_cannot_be_is_an_error_when_it_is_made(
    schedule: type, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        schedule(**arguments)
