"""Records of the contest away from home: one file per task, and the tables of a half."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.away.averages import AVERAGES, NONE
from benchmarks.away.contestants import KFC_VARIANTS
from benchmarks.contest.report import iterations_and_seconds, lists_on_one_line, measured_with


@dataclass
class Outcome:
    """The outcome of one run with one average.

    Attributes:
        iterations: Iterations to the target; None if it was not reached.
        seconds: CPU seconds of these steps.
        steps: Iterations up to the last evaluation, or to the target.
        loss: The last training loss; None if it is not finite.
    """

    iterations: float | None
    seconds: float | None
    steps: int
    loss: float | None


@dataclass
class Entry:
    """The results of one contestant on one task.

    Attributes:
        title: Its name in tables.
        search: By learning rate and average, iterations to the target on the seed of the search; None if never.
        lr: The chosen learning rate; None before the search.
        average: The chosen average; None if all are reported.
        runs: The outcomes, by seed and average.
    """

    title: str
    search: dict[str, dict[str, float | None]] = field(default_factory=dict)
    lr: float | None = None
    average: str | None = None
    runs: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def medians(self, average: str, seeds: Sequence[int]) -> tuple[float, float] | None:
        """Iterations and seconds to the target, infinite if never; None while a seed is missing."""
        if any(str(seed) not in self.runs for seed in seeds):
            return None
        outcomes = [self.runs[str(seed)][average] for seed in seeds]
        iterations = median(math.inf if o.iterations is None else o.iterations for o in outcomes)
        return iterations, median(math.inf if o.seconds is None else o.seconds for o in outcomes)


@dataclass
class Record:
    """The results of one task.

    Attributes:
        task: Its name.
        title: Its description.
        batch_size: Examples in a batch.
        target: The training loss to reach.
        budget: The largest number of iterations of a run.
        entries: The entries, by contestant.
    """

    task: str
    title: str
    batch_size: int
    target: float
    budget: int
    entries: dict[str, Entry] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write JSON with the used versions, completely or not at all."""
        content = {**asdict(self), "measured_with": measured_with()}
        partial = path.with_suffix(".partial")
        partial.write_text(lists_on_one_line(json.dumps(content, indent=1)) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Load a file of :meth:`save`."""
        content: dict[str, Any] = json.loads(path.read_text())
        del content["measured_with"]
        content["entries"] = {name: _entry(entry) for name, entry in content["entries"].items()}
        return cls(**content)


def _entry(content: dict[str, Any]) -> Entry:
    runs = {
        seed: {average: Outcome(**outcome) for average, outcome in outcomes.items()}
        for seed, outcomes in content.pop("runs").items()
    }
    return Entry(**content, runs=runs)


def table(records: Sequence[Record], names: Sequence[str], seeds: Sequence[int]) -> str:
    """Iterations / CPU seconds to the target: KFC's rows first, without and with averages, then the peers'."""
    rows: list[tuple[str, str | None]] = [
        (name, average) for name in names if name in KFC_VARIANTS for average in AVERAGES
    ]
    rows += [(name, None) for name in names if name not in KFC_VARIANTS]
    titles = {name: entry.title for record in records for name, entry in record.entries.items()}
    cells = {(name, average): _title(titles[name], average) for name, average in rows if name in titles}
    for record in records:
        column: dict[tuple[str, str | None], tuple[float, float] | None] = {}
        chosen: dict[tuple[str, str | None], str | None] = {}
        for name, average in cells:
            entry = record.entries.get(name)
            of = chosen[name, average] = average if average is not None or entry is None else entry.average
            column[name, average] = entry.medians(of, seeds) if entry is not None and of is not None else None
        fewest = min((value[0] for value in column.values() if value is not None), default=math.inf)
        for key, value in column.items():
            text = "" if value is None else _cell(value)
            if value is not None and key[1] is None and chosen[key] != NONE:
                text += f" ({chosen[key]})"
            best = value is not None and value[0] == fewest and math.isfinite(fewest)
            cells[key] += f" | **{text}**" if best else f" | {text}"
    heads = [f"{record.task.replace('_', ' ')}, {record.batch_size}, {record.target:.4g}" for record in records]
    lines = ["| task, batch, loss | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*lines, *(f"| {row} |" for row in cells.values())])


def _title(title: str, average: str | None) -> str:
    return title if average in (None, NONE) else f"{title}, averaged {average}"


def _cell(values: tuple[float, float]) -> str:
    return "-" if math.isinf(values[0]) else iterations_and_seconds(*values)


def _peers(record: Record, names: Sequence[str], seeds: Sequence[int]) -> dict[str, tuple[float, float]]:
    """The medians of the peers that have run on all seeds, each with its chosen average, by title."""
    entries = [record.entries[name] for name in names if name not in KFC_VARIANTS and name in record.entries]
    medians = {entry.title: entry.medians(entry.average, seeds) for entry in entries if entry.average is not None}
    return {title: values for title, values in medians.items() if values is not None}


def ahead(records: Sequence[Record], names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A line for each column of KFC: the numbers of tasks with fewer iterations, and with less time, than all peers."""
    lines = []
    for name in (name for name in names if name in KFC_VARIANTS):
        for average in AVERAGES:
            wins, compared = [0, 0], 0
            for record in records:
                own = record.entries[name].medians(average, seeds) if name in record.entries else None
                peers = _peers(record, names, seeds).values()
                if own is None or not peers:
                    continue
                compared += 1
                for position in (0, 1):
                    wins[position] += own[position] < min(values[position] for values in peers)
            if compared == len(records):
                title = record.entries[name].title + ("" if average == NONE else f", averaged {average}")
                lines.append(f"- {title}: fewest iterations on {wins[0]}, least time on {wins[1]} of {compared}.")
    return lines


def missed(records: Sequence[Record], names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A line for each task on which a peer needs fewer iterations, or less time, than KFC at its defaults."""
    lines = []
    for record in records:
        own = record.entries["kfc"].medians(NONE, seeds) if "kfc" in record.entries else None
        if own is None:
            continue
        peers = _peers(record, names, seeds)
        for unit, position in (("iterations", 0), ("CPU seconds", 1)):
            better = {title: values[position] for title, values in peers.items() if values[position] < own[position]}
            if better:
                listed = ", ".join(
                    f"{title} {value:.3g}" for title, value in sorted(better.items(), key=lambda i: i[1])
                )
                ours = "never there" if math.isinf(own[position]) else f"{own[position]:.3g}"
                lines.append(f"- {record.task}, {unit}: KFC at its defaults {ours}; ahead of it {listed}.")
    return lines
