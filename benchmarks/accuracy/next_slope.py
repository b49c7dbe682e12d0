"""Iterations to the targets with and without a radius that follows the slope of a step on the next batch.

The tasks are those that choose constants, as in :mod:`benchmarks.accuracy.damping_unit`. Run it by
``python -m benchmarks.accuracy.next_slope``.
"""

from __future__ import annotations

import argparse
import math
from statistics import median
from unittest import mock

import torch

from benchmarks.away.averages import AVERAGES, AveragedRun
from benchmarks.away.tasks import AWAY, CHOOSING
from benchmarks.contest.contestants import kfc
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.paths import RESULTS
from lightning_kfc.trust_region import region

NEVER = 10**9
#: By title: the exponent of the radius, and the steps between reviews after the first ten.
VARIANTS = {
    "reviews every 5 steps alone": (0.0, 5),
    "reviews every 10 steps alone": (0.0, 10),
    "0.35 c, reviews every 10": (0.35, 10),
    "0.35 c, none after the start": (0.35, NEVER),
    "0.7 c, reviews every 10": (0.7, 10),
}
SHOWN = ("none", "0.9")


def iterations(task: Task, seed: int) -> dict[str, float]:
    """By average of the weights: iterations to the hardest target; infinity where the budget ends before."""
    run = AveragedRun(task, kfc("kfc", "KFC", rule="natural"), 0.5, seed)
    while not (run.over() or all(run.arrived(name) for name in AVERAGES)):
        run.advance(5)
    return {name: run.curves[name].reach(task.targets[-1]).iterations for name in SHOWN}


def row(task: Task, seeds: int) -> list[str]:
    """For each variant the medians of the seeds, without and with an average."""
    cells = []
    for exponent, every in VARIANTS.values():
        with mock.patch.multiple(region, NEXT_SLOPE=exponent, REVIEW_EVERY_N_STEPS=every):
            found = [iterations(task, seed) for seed in range(seeds)]
        medians = (median(entry[name] for entry in found) for name in SHOWN)
        cells.append(" · ".join(f"{value:.0f}" if math.isfinite(value) else "-" for value in medians))
    return cells


def table(rows: dict[str, list[str]], seeds: int) -> str:
    """The table; ``-`` where the budget ended before the target."""
    lines = [
        f"Iterations to the hardest target, rule natural, without · with averaged weights; medians of {seeds} seeds.",
        "",
        "| task | " + " | ".join(VARIANTS) + " |",
        "|" + "---|" * (len(VARIANTS) + 1),
    ]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the table after each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    home = (TASKS["conv"].at(128), TASKS["conv_autoencoder"], TASKS["resnet"])
    rows: dict[str, list[str]] = {}
    for task in (*(AWAY[name] for name in CHOOSING), *home):
        rows[task.label] = row(task, options.seeds)
        (RESULTS / "next_slope.md").write_text(table(rows, options.seeds))
        print(table(rows, options.seeds), flush=True)


if __name__ == "__main__":
    main()
