"""The table of goals is that of the records, and a goal is met on the right side of its limit."""

from __future__ import annotations

import pytest

from benchmarks.away import goals
from benchmarks.away.records import Entry, Outcome, Record
from benchmarks.paths import RESULTS


def record(task: str, **values: tuple[float | None, float | None]) -> Record:
    """A record with the same iterations and seconds on all seeds; those of KFC are of its default average."""

    def entry(name: str, value: tuple[float | None, float | None]) -> Entry:
        missed = Outcome(None, None, 300, 1.0)
        outcomes = {"none": missed, "0.8": missed, "0.9": missed}
        average = None if name.startswith("kfc") else "0.8"
        outcomes[average or "0.9"] = Outcome(*value, 10, 0.1)
        return Entry(name, {}, 0.1, average, {str(seed): outcomes for seed in range(3)})

    return Record(task, "a net", 64, 1.0, 300, {name: entry(name, value) for name, value in values.items()})


def test_the_published_table_is_that_of_the_records() -> None:
    assert (RESULTS / "away_goals.md").read_text("utf-8") == goals.report() + "\n", (
        "run `python -m benchmarks.away.goals`"
    )


def test_each_unit_has_its_best_peer_and_other_rules_of_kfc_are_no_peers() -> None:
    found = goals.pair(
        "home", record("conv", kfc=(50.0, 3.0), kfc_adam=(1.0, 1.0), muon=(100.0, 4.0), adam=(200.0, 2.0))
    )
    assert found.iterations == (100.0, "muon")
    assert found.seconds == (2.0, "adam")
    assert found.ratios == (0.5, 1.5)
    assert goals.tasks_table([found], [found]).splitlines()[2] == (
        "| home: conv, 64 | 50 / 3.00 | 50 / 3.00 (0.9) | 100, muon | 0.50, 0.50 | 2.00, adam | **1.50**, **1.50** |"
    )


def test_kfc_has_its_default_average_and_in_other_rows_its_best_one() -> None:
    task = record("conv", kfc=(50.0, 3.0), muon=(100.0, 4.0))
    for runs in task.entries["kfc"].runs.values():
        runs["0.8"] = Outcome(40.0, 3.5, 10, 0.1)
    assert goals.pair("home", task).own == (50.0, 3.0)
    best = goals.pair("home", task, goals.AVERAGES)
    assert (best.own, best.average) == ((40.0, 3.5), "0.8")


@pytest.mark.parametrize(
    ("seconds", "met"),
    [([4.0] * 5, True), ([4.0] * 4 + [5.0], True), ([4.0] * 4 + [5.1], False), ([4.0] * 3 + [5.0] * 2, False)],
)
def test_the_time_is_the_least_on_most_tasks_and_not_far_behind_on_any(seconds: list[float], met: bool) -> None:
    pairs = [goals.pair("home", record("conv", kfc=(69.0, own), muon=(100.0, 4.0))) for own in seconds]
    iterations, time = goals.rows_of_tasks(pairs, "")
    assert iterations.endswith("| met |")
    assert time.endswith("| met |") == met
    assert f" of {len(seconds)}, worst {max(seconds) / 4:.2f} (" in time


def test_a_task_that_kfc_does_not_reach_misses_its_goals() -> None:
    pairs = [goals.pair("home", record("conv", kfc=(None, None), muon=(100.0, 4.0)))]
    assert all(row.endswith("| **missed** |") for row in goals.rows_of_tasks(pairs, ""))


def test_the_peer_of_a_named_goal_needs_so_many_times_more() -> None:
    tasks = {
        "conv_b512": record("conv", kfc=(20.0, 2.0), sgd=(200.0, 9.9)),
        "autoencoder_b512": record("autoencoder", kfc=(40.0, 10.0), adam=(None, None)),
    }
    met = [row.endswith("| met |") for row in goals.rows_of_named(tasks, goals.DEFAULT, "")]
    assert met == [True, False, True, True]


def test_a_loss_that_is_not_finite_is_a_divergence() -> None:
    tasks = record("conv", kfc=(20.0, 2.0))
    assert goals.row_of_divergences([tasks], []).endswith("| 0 of 9 loss curves | met |")
    tasks.entries["kfc"].runs["1"]["none"].loss = None
    assert "| **missed** |" in goals.row_of_divergences([tasks], [])
