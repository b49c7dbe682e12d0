"""Iterations to the targets by the constant of the automatic damping, and with one number for all layers.

Training loss of weights averaged with decay 0.9. The tasks are those that choose constants: half of the tasks away from
home, and some of the contest. Run it by ``python -m benchmarks.accuracy.damping_unit``.
"""

from __future__ import annotations

import argparse
import math
from statistics import median
from unittest import mock

import torch

from benchmarks.away.tasks import AWAY, CHOOSING
from benchmarks.contest.contestants import kfc
from benchmarks.contest.harness import Run
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.paths import RESULTS
from lightning_kfc.trust_region import region

CONSTANTS = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5)
#: What an automatic damping began at before, in the loss's units.
NUMBER = 0.003
DECAY = 0.9


def iterations(task: Task, seed: int, **settings: object) -> float:
    """Iterations to the hardest target; infinity where the budget ends before."""
    run = Run(task, kfc("kfc", "KFC", average=DECAY, rule="natural", **settings), 0.5, seed)
    target = task.targets[-1]
    while not run.over() and min(run.curve.losses) > target:
        run.advance(5)
    return run.curve.reach(target).iterations


def row(task: Task, seeds: int) -> list[float]:
    """Medians of the seeds: for the number, then for each constant."""
    found = [median(iterations(task, seed, damping=NUMBER) for seed in range(seeds))]
    for constant in CONSTANTS:
        with mock.patch.object(region, "DAMPING", constant):
            found.append(median(iterations(task, seed) for seed in range(seeds)))
    return found


def table(rows: dict[str, list[float]], seeds: int) -> str:
    """The table; ``-`` where the budget ended before the target."""
    head = [f"damping {NUMBER}", *(f"{constant:g} h / w²" for constant in CONSTANTS)]
    lines = [
        f"Iterations to the hardest target, weights averaged with decay {DECAY}; medians of {seeds} seeds.",
        "",
        "| task | " + " | ".join(head) + " |",
        "|" + "---|" * (len(head) + 1),
    ]
    for name, values in rows.items():
        cells = (f"{value:.0f}" if math.isfinite(value) else "-" for value in values)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the table after each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    home = (TASKS["conv"].at(512), TASKS["conv"].at(128), TASKS["conv_autoencoder"], TASKS["resnet"])
    rows: dict[str, list[float]] = {}
    for task in (*(AWAY[name] for name in CHOOSING), *home):
        rows[task.label] = row(task, options.seeds)
        (RESULTS / "damping_unit.md").write_text(table(rows, options.seeds))
        print(table(rows, options.seeds), flush=True)


if __name__ == "__main__":
    main()
