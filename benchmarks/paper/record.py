"""The record of trainings, the next training, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contest.curves import at_edge
from benchmarks.contest.report import lists_on_one_line, times_table
from benchmarks.contest.tuning import beyond
from benchmarks.paper.training import Contestant, Run

#: Training errors whose time is reported: assumed, the paper's text was not at hand.
THRESHOLDS: Mapping[str, tuple[float, ...]] = {"cifar10": (0.3, 0.2, 0.1, 0.05), "svhn": (0.1, 0.05, 0.02, 0.01)}
SEARCH_SEED = 100
#: The largest number of extensions of a grid of learning rates.
EXTENSIONS = 3


@dataclass
class Record:
    """The trainings on one data set.

    Attributes:
        data: Its name.
        training_examples: How many it has to train on.
        test_examples: How many it has to test.
        runs: All trainings; those with :data:`SEARCH_SEED` searched the learning rate.
        measured_on: Versions and device of the last one.
    """

    data: str
    training_examples: int
    test_examples: int
    runs: list[Run] = field(default_factory=list)
    measured_on: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lists_on_one_line(json.dumps(asdict(self), indent=1)) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Load a file of :meth:`save`."""
        content = json.loads(path.read_text("utf-8"))
        return cls(**{**content, "runs": [Run(**run) for run in content["runs"]]})

    def of(self, name: str, *, search: bool) -> list[Run]:
        """A contestant's trainings, those of its search or those that are reported."""
        return [run for run in self.runs if run.contestant == name and (run.seed == SEARCH_SEED) == search]


def best_rate(searched: Sequence[Run]) -> float:
    """The learning rate with the lowest training error at the end of the search."""
    return min(searched, key=lambda run: run.training_errors[-1]).lr


def next_run(
    record: Record, name: str, contestant: Contestant, seeds: Sequence[int], epochs: float, search_epochs: float
) -> Run | None:
    """A contestant's next training: a learning rate of its search, then a seed; None after the last."""
    lr = contestant.rates[0]
    if len(contestant.rates) > 1:
        searched = record.of(name, search=True)
        tried = [run.lr for run in searched]
        missing = [rate for rate in contestant.rates if rate not in tried]
        if not missing and len(tried) < len(contestant.rates) + EXTENSIONS:
            missing = [beyond(tried, best_rate(searched))] if at_edge(best_rate(searched), tried) else []
        if missing:
            return Run(name, missing[0], SEARCH_SEED, search_epochs)
        lr = best_rate(searched)
    done = {run.seed for run in record.of(name, search=False)}
    return next((Run(name, lr, seed, epochs) for seed in seeds if seed not in done), None)


def reach(run: Run, threshold: float) -> tuple[float, float]:
    """Iterations and seconds at the first measured training error that is no higher; infinite if there is none."""
    points = zip(run.training_errors, run.iterations, run.seconds, strict=True)
    return next(((steps, seconds) for error, steps, seconds in points if error <= threshold), (math.inf, math.inf))


def markdown(record: Record, contestants: Mapping[str, Contestant]) -> str:
    """Iterations and seconds to training errors, then the errors at the end: medians of the seeds."""
    runs = {name: found for name in contestants if (found := record.of(name, search=False))}
    titles = {name: f"{contestants[name].title}, batch {contestants[name].batch_size}" for name in runs}
    thresholds = THRESHOLDS[record.data]
    columns: list[dict[str, tuple[float, float] | None]] = []
    for threshold in thresholds:
        reached = {name: [reach(run, threshold) for run in found] for name, found in runs.items()}
        columns.append({name: _medians(pairs) for name, pairs in reached.items()})
    lines = [
        f"{record.data}, {record.training_examples} training and {record.test_examples} test examples, on "
        f"{record.measured_on['device']}. Iterations / wall-clock seconds; medians; bold: the least time; -: never.",
        "",
        times_table("training error", [f"{threshold:.0%}" for threshold in thresholds], titles, columns),
        "",
        "| at the end | seeds | lr | searched | epochs | training error | test error | lowest test error | seconds |",
        "|" + "---|" * 9,
    ]
    for name, found in runs.items():
        searched = ", ".join(f"{run.lr:g}" for run in sorted(record.of(name, search=True), key=lambda run: run.lr))
        cells = [titles[name], str(len(found)), f"{found[0].lr:g}", searched or "none", f"{found[0].epochs:g}"]
        cells += [f"{median(run.training_errors[-1] for run in found):.2%}"]
        cells += [f"{median(run.test_errors[-1] for run in found):.2%}"]
        cells += [f"{median(min(run.test_errors) for run in found):.2%}"]
        lines.append("| " + " | ".join([*cells, f"{median(run.seconds[-1] for run in found):.1f}"]) + " |")
    return "\n".join(lines)


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
