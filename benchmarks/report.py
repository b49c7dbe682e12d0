"""Results of the convergence benchmark: a file, and a markdown table."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.curves import Curve, at_edge, median_ratio


@dataclass
class Results:
    """All that one task's benchmark measured.

    Attributes:
        task: The task's name.
        title: What it is.
        batch_size: Examples in a batch.
        budget: Iterations of each run.
        targets: Training losses whose time is reported.
        seeds: Of the reported runs.
        tuning_seeds: Of the runs that chose the learning rates.
        titles: The contestants' titles, by name.
        grids: Their grids.
        lrs: What was chosen.
        tuning: Iterations to the hardest target, by contestant and learning rate, one a seed; None for never.
        curves: The reported curves, by contestant, one a seed.
    """

    task: str
    title: str
    batch_size: int
    budget: int
    targets: Sequence[float]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    titles: dict[str, str]
    grids: dict[str, Sequence[float]]
    lrs: dict[str, float]
    tuning: dict[str, dict[str, list[float | None]]]
    curves: dict[str, list[Curve]]

    def save(self, path: Path) -> None:
        """Write JSON, with the versions that were measured."""
        entries: dict[str, Any] = dict(vars(self))
        entries["curves"] = {name: [curve.as_dict() for curve in curves] for name, curves in self.curves.items()}
        entries["measured_with"] = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entries, indent=1)
        path.write_text(_lists_on_one_line(text) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote."""
        entries = json.loads(path.read_text())
        del entries["measured_with"]
        entries["curves"] = {
            name: [Curve.from_dict(curve) for curve in curves] for name, curves in entries["curves"].items()
        }
        return cls(**entries)


def _lists_on_one_line(text: str) -> str:
    lines: list[str] = []
    depth = 0
    for line in text.splitlines():
        stripped = line.strip()
        if depth:
            lines[-1] += stripped + (" " if stripped.endswith(",") else "")
        else:
            lines.append(line)
        if stripped.endswith("[") and not depth:
            depth = 1
        elif depth and stripped.rstrip(",") == "]":
            depth = 0
        elif depth and stripped.endswith(("{", "[")):
            # A list of objects stays as it is.
            depth = 0
    return "\n".join(lines)


def markdown(results: Results, reference: str = "kfc") -> str:
    """A table of medians over seeds, and of medians of ratios to the reference contestant.

    Args:
        results: What was measured.
        reference: The contestant that the ratios divide by.
    """
    lines = [
        f"{results.title}, batch {results.batch_size}; {len(results.seeds)} seeds; learning rates chosen on "
        f"{len(results.tuning_seeds)} other(s), by iterations to a training loss of {results.targets[-1]:g}.",
        "",
        "| training loss | optimizer | lr | iterations | ratio | CPU seconds | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in results.targets:
        reached = {name: [curve.reach(target) for curve in curves] for name, curves in results.curves.items()}
        for name, own in reached.items():
            lr = f"{results.lrs[name]:g}" + (
                " (edge of grid)" if at_edge(results.lrs[name], results.grids[name]) else ""
            )
            cells = [f"{target:g}", results.titles[name], lr]
            for unit, digits in (("iterations", 0), ("seconds", 1)):
                values = [getattr(reach, unit) for reach in own]
                cells.append(_number(median(values), digits))
                if name == reference or reference not in reached:
                    cells.append("1")
                else:
                    cells.append(_ratio([getattr(reach, unit) for reach in reached[reference]], values))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_unreached(results), *_grids(results)])


def _unreached(results: Results) -> Iterable[str]:
    """What a median hides: runs that missed the easiest target, or ended above the loss they began with."""
    for name, curves in results.curves.items():
        missed = sum(math.isinf(curve.reach(results.targets[0]).iterations) for curve in curves)
        worse = sum(not curve.losses[-1] < curve.losses[0] for curve in curves)
        if missed:
            yield (
                f"**{results.titles[name]}: {missed} of {len(curves)} reported runs never reached "
                f"{results.targets[0]:g}, {worse} ended above their first loss: "
                "its learning rate is not a stable choice.**"
            )


def _grids(results: Results) -> Iterable[str]:
    for name, grid in results.grids.items():
        if len(grid) == 1:
            yield f"{results.titles[name]}: lr {grid[0]:g}, not tuned."
            continue
        tried = []
        for lr, iterations in results.tuning[name].items():
            values = [math.inf if value is None else value for value in iterations]
            tried.append(f"{lr}: {_number(median(values), 0)}")
        yield f"{results.titles[name]}: iterations by lr: {', '.join(tried)}."


def _number(value: float, digits: int) -> str:
    return "-" if math.isinf(value) else f"{value:.{digits}f}"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    ratio = median_ratio(ours, theirs)
    if math.isnan(ratio):
        return "-"
    return "never" if math.isinf(ratio) else f"{ratio:.1f}"
