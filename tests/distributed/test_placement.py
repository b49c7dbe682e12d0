"""Placement is a pure function: every job has one owner, ranks are balanced, every rank gets every update once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.distributed.placement import Grid, Placement, gradient_workers
from lightning_kfc.utilities.load_balancing import factorisation_cost, longest_first

costs = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 1000).map(float), min_size=1, max_size=12)


@given(costs, st.integers(1, 9))
def test_the_longest_rank_works_no_longer_than_graham_s_bound(jobs: dict[str, float], ranks: int) -> None:
    given_to = longest_first(jobs, ranks)
    assert set(given_to) == set(jobs)
    loads = [sum(jobs[name] for name, rank in given_to.items() if rank == own) for own in range(ranks)]
    # No assignment is shorter than the longest job, the mean, or two of the ranks + 1 longest jobs.
    longest = sorted(jobs.values(), reverse=True)
    pair = longest[ranks - 1] + longest[ranks] if len(longest) > ranks else 0.0
    best = max(longest[0], sum(longest) / ranks, pair)
    assert max(loads) <= best * 2
    if len(jobs) <= 6 and ranks <= 3:
        optimum = min(
            max(sum(c for c, r in zip(jobs.values(), ranks_of, strict=True) if r == own) for own in range(ranks))
            for ranks_of in itertools.product(range(ranks), repeat=len(jobs))
        )
        assert max(loads) <= optimum * (4 / 3 - 1 / (3 * ranks)) + 1e-9


@given(costs, st.integers(1, 9))
def test_the_assignment_does_not_depend_on_the_order_of_the_layers(jobs: dict[str, float], ranks: int) -> None:
    backwards = dict(reversed(jobs.items()))
    assert longest_first(backwards, ranks) == longest_first(jobs, ranks)


def test_a_dense_factor_costs_its_cube_in_every_group_and_a_diagonal_its_length() -> None:
    assert factorisation_cost({"A": (2, 10, 10), "G": (2, 7)}) == 2 * 1000 + 2 * 7


@pytest.mark.parametrize(
    ("placement", "ranks", "workers"),
    [("comm-opt", 6, 6), ("mem-opt", 6, 1), (0.5, 6, 3), (0.4, 6, 2), (0.01, 6, 1), (1.0, 6, 6), (0.5, 7, 1)],
)
def test_the_number_of_workers_is_the_divisor_nearest_to_the_fraction(
    placement: str | float, ranks: int, workers: int
) -> None:
    assert gradient_workers(placement, ranks) == workers


@given(
    st.integers(1, 24).flatmap(
        lambda w: st.tuples(st.just(w), st.sampled_from([k for k in range(1, w + 1) if w % k == 0]))
    )
)
def test_each_rank_gets_each_update_from_one_rank_that_holds_the_inverse(size: tuple[int, int]) -> None:
    grid = Grid(*size)
    for owner, rank in itertools.product(range(grid.ranks), repeat=2):
        source = grid.source(owner, rank)
        assert grid.holds(owner, source)
        assert rank in grid.receivers(source)
        assert (source == rank) == grid.holds(owner, rank)
    assert sum(grid.holds(0, rank) for rank in range(grid.ranks)) == grid.workers
    assert {m for rank in range(grid.ranks) for m in grid.members(rank)} == set(range(grid.ranks))


def test_layers_found_later_go_to_the_ranks_that_have_least_to_do_and_the_others_stay() -> None:
    placement = Placement(Grid(2, 1))
    placement.add({"a": 5.0, "b": 3.0})
    placement.add({"a": 5.0, "b": 3.0, "c": 1.0})
    assert placement.owners == {"a": 0, "b": 1, "c": 1}


def test_where_there_are_more_ranks_than_layers_no_group_holds_them_all() -> None:
    placement = Placement(Grid(16, 4))
    placement.add({str(i): 1.0 for i in range(8)})
    assert sorted(placement.grid.group(owner) for owner in placement.owners.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(set(placement.owners.values())) == 8
    assert sorted(map(placement.grid.in_turns, range(16))) == list(range(16))
