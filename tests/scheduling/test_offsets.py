"""The offset of each layer is a pure function, and no step is more expensive than necessary."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.scheduling.staggering import StaggeredDates, open_offsets, shared_out

costs = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 1000).map(float), min_size=1, max_size=12)
schedules = st.builds(RefreshSchedule, st.integers(1, 12), st.integers(1, 30), st.integers(0, 12))


@given(schedules, st.booleans())
def test_slots_are_steps_of_the_period_those_with_fresh_factors_first_dates_of_statistics_last(
    schedule: RefreshSchedule, with_statistics: bool
) -> None:
    factors, inverses = schedule.factor_every_n_steps, schedule.inverse_every_n_steps
    offsets = list(open_offsets(schedule, with_statistics=with_statistics))
    if inverses < factors or (with_statistics and inverses % factors):
        assert offsets == []
    elif with_statistics:
        assert offsets == list(range(0, inverses, factors))
    else:
        assert sorted(offsets) == list(range(inverses))
        ages = [(offset - 1) % factors for offset in offsets]
        assert ages == sorted(ages)


@given(costs, st.integers(1, 12))
def test_no_step_costs_more_than_the_longest_layer_unless_all_steps_are_used(
    jobs: dict[str, float], period: int
) -> None:
    used, given_to = shared_out(jobs, iter(range(period)))
    assert set(given_to) == set(jobs)
    assert set(given_to.values()) <= set(used)
    loads = Counter[int]()
    for name, offset in given_to.items():
        loads[offset] += jobs[name]
    heaviest, load = loads.most_common(1)[0]
    if len(used) < min(period, len(jobs)):
        assert load == max(jobs.values())
    # The last layer that an offset was given came when no other offset had less: Graham's argument.
    last = min(jobs[name] for name, offset in given_to.items() if offset == heaviest)
    assert load <= max(max(jobs.values()), (sum(jobs.values()) - last) / len(used) + last)
    # As few as that: with one less, some step would have cost more.
    if len(used) > 1:
        assert sum(jobs.values()) > max(jobs.values()) * (len(used) - 1) or load == max(jobs.values())


def test_large_layers_are_alone_and_small_ones_together() -> None:
    jobs = {"big": 100.0, "also": 90.0, **{f"small{i}": 10.0 for i in range(10)}}
    used, given_to = shared_out(jobs, iter(range(20)))
    assert used == [0, 1, 2]
    assert given_to["big"] == 0
    assert Counter(given_to.values())[2] == 10 or Counter(given_to.values())[2] == 9


@given(costs, schedules)
def test_slots_do_not_depend_on_the_order_of_the_layers_and_are_kept_in_a_state(
    jobs: dict[str, float], schedule: RefreshSchedule
) -> None:
    one, two = StaggeredDates(schedule, jobs), StaggeredDates(schedule, dict(reversed(jobs.items())))
    found = {name: one.of(name) for name in jobs}
    assert found == {name: two.of(name) for name in jobs}
    # What was given stays, even where it would come out otherwise now.
    three = StaggeredDates(schedule, dict.fromkeys(jobs, 1.0))
    three.load_state_dict(one.state_dict())
    assert found == {name: three.of(name) for name in jobs}


def test_a_later_layer_goes_where_there_is_least_to_do_also_after_a_resume() -> None:
    jobs = {"a": 8.0, "b": 5.0, "c": 4.0}
    offsets = StaggeredDates(RefreshSchedule(1, 2, 0), jobs)
    assert {name: offsets.of(name) for name in jobs} == {"a": 0, "b": 1, "c": 1}
    state = offsets.state_dict()
    jobs |= {"d": 3.0, "e": 1.0}
    resumed = StaggeredDates(RefreshSchedule(1, 2, 0), jobs)
    resumed.load_state_dict(state)
    for either in (offsets, resumed):
        assert {name: either.of(name) for name in jobs} == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}


def test_a_state_of_other_periods_is_not_taken_over() -> None:
    jobs = {"a": 1.0, "b": 1.0, "c": 1.0}
    one, two = StaggeredDates(RefreshSchedule(10, 20), jobs), StaggeredDates(RefreshSchedule(1, 2), jobs)
    assert [one.of(name) for name in jobs] == [1, 11, 2]
    two.load_state_dict(one.state_dict())
    assert [two.of(name) for name in jobs] == [0, 1, 0]


def test_without_staggering_there_are_no_offsets() -> None:
    jobs = {"a": 1.0, "b": 1.0}
    together = StaggeredDates(RefreshSchedule(10, 20), jobs, staggered=False)
    assert [together.of(name) for name in jobs] == [None, None]


@given(schedules, st.integers(0, 29), st.integers(0, 100))
def test_a_slot_s_dates_are_those_of_the_warm_up_and_then_one_a_period(
    schedule: RefreshSchedule, offset: int, step: int
) -> None:
    offset %= schedule.inverse_every_n_steps
    dates = [
        s
        for s in range(step + 1)
        if (
            schedule.inverses_due(s)
            if s < max(schedule.warmup_steps, 1)
            else (s - offset) % schedule.inverse_every_n_steps == 0
        )
    ]
    assert schedule.last_inverses_due(step, offset) == dates[-1]


@pytest.mark.parametrize("never", [10**9])
def test_periods_without_end_cost_nothing(never: int) -> None:
    jobs = {str(i): 1.0 for i in range(300)}
    offsets = StaggeredDates(RefreshSchedule(10, never), jobs)
    assert len({offsets.of(name) for name in jobs}) == 300
    assert list(itertools.islice(open_offsets(RefreshSchedule(never, never), with_statistics=False), 2)) == [1, 2]
