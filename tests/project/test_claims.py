"""The README's table equals the records of the contests."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from benchmarks import claims
from benchmarks.away.records import Entry, Outcome, Record
from benchmarks.away.tasks import AWAY
from benchmarks.contest.tasks import TASKS
from benchmarks.paths import RESULTS, ROOT


def test_the_readme_and_the_documentation_hold_the_table_of_the_records() -> None:
    table = claims.claims()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert claims.with_claims(readme, table) == readme, "run `python -m benchmarks.claims`"
    assert (RESULTS / "claims.md").read_text("utf-8") == table, "run `python -m benchmarks.claims`"


def test_a_cell_is_the_median_of_the_runs_of_the_file_with_the_chosen_average() -> None:
    entry = json.loads((RESULTS / "home_conv_b128.json").read_text("utf-8"))["entries"]["muon"]
    outcomes = [outcomes[entry["average"]] for outcomes in entry["runs"].values()]
    (row,) = [line for line in claims.claims().splitlines() if line.startswith("| conv net, batch 128 |")]
    iterations, seconds = row.split("|")[3].replace("*", "").split("/")
    assert float(iterations) == round(median(outcome["iterations"] for outcome in outcomes))
    assert float(seconds) == round(median(outcome["seconds"] for outcome in outcomes), 1)


def test_every_task_of_both_contests_has_a_row_once_it_is_measured() -> None:
    assert set(claims.HOME) == set(TASKS)
    assert set(claims.ELSEWHERE) == set(AWAY)


def test_the_least_time_is_bold_and_what_was_not_reached_is_never_bold(tmp_path: Path) -> None:
    def entry(average: str | None, values: list[tuple[float | None, float | None]]) -> Entry:
        runs = {str(seed): {"0.9": Outcome(*value, 10, 1.0)} for seed, value in enumerate(values)}
        return Entry("some", {}, 0.1, average, runs)

    entries = {
        "adam": entry("0.9", [(200.0, 1.0), (220.0, 1.2), (210.0, 1.4)]),
        "muon": entry("0.9", [(None, None), (None, None), (90.0, 0.1)]),
        "kfc": entry(None, [(50.0, 2.0), (60.0, 2.5), (55.0, 2.2)]),
    }
    Record("gru", "a net", 64, 1.0, 300, entries).save(tmp_path / "away_gru.json")
    rows = claims.claims(tmp_path).splitlines()
    assert rows[-1].replace("\u00a0", " ") == "| GRU, batch 64 | **210 / 1.2** | never |  | 55 / 2.2 |"
    assert rows[2].startswith("| **At home**")
    assert len(rows) == 5


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="The page lacks"):
        claims.with_claims("a page", "a table")


def test_marks_keep_what_stands_around_them() -> None:
    page = f"before\n{claims.BEGIN}old\n{claims.END}after\n"
    assert claims.with_claims(page, "| new |\n") == f"before\n{claims.BEGIN}\n| new |\n\n{claims.END}after\n"
