"""Tables of iterations by variants of KFC, on tasks that choose constants: half of those away from home, and others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.away.tasks import AWAY, CHOOSING
from benchmarks.contest.tasks import Task
from benchmarks.paths import RESULTS


def count(iterations: Sequence[float]) -> str:
    """The median over seeds; ``-`` if the budget ended before the target."""
    middle = median(iterations)
    return f"{middle:.0f}" if math.isfinite(middle) else "-"


def table(title: str, variants: Sequence[str], rows: Mapping[str, Sequence[str]], seeds: int) -> str:
    """A row a task, a column a variant."""
    lines = [
        f"Iterations to the hardest target, {title}; medians of {seeds} seeds.",
        "",
        "| task | " + " | ".join(variants) + " |",
        "|" + "---|" * (len(variants) + 1),
    ]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def measure(
    description: str | None,
    file: str,
    title: str,
    variants: Sequence[str],
    row: Callable[[Task, int], Sequence[str]],
    home: Sequence[Task],
) -> None:
    """Run the command line, and write the table after each task.

    Args:
        description: What the script does.
        file: The table's, in the folder of results.
        title: What is measured.
        variants: The columns.
        row: From a task and a number of seeds to the cells of its row.
        home: Tasks of the contest, after those away from home.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Sequence[str]] = {}
    for task in (*(AWAY[name] for name in CHOOSING), *home):
        rows[task.label] = row(task, options.seeds)
        text = table(title, variants, rows, options.seeds)
        (options.results / file).write_text(text)
        print(text, flush=True)
