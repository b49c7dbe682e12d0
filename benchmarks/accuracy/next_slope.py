"""Iterations to the targets with and without a radius that follows the slope of a step on the next batch.

The tasks are those that choose constants, as in :mod:`benchmarks.accuracy.damping_unit`. Run it by
``python -m benchmarks.accuracy.next_slope``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from benchmarks.accuracy.variants import count, measure
from benchmarks.away.averages import AVERAGES, AveragedRun
from benchmarks.contest.contestants import kfc
from benchmarks.contest.tasks import TASKS, Task
from lightning_kfc.trust_region import region

NEVER = 10**9
#: By title: the exponent of the radius, and the steps between reviews after the first ones.
VARIANTS = {
    "reviews every 5 steps alone": (0.0, 5),
    "reviews every 10 steps alone": (0.0, 10),
    "0.35 c, reviews every 10": (0.35, 10),
    "0.35 c, none after the start": (0.35, NEVER),
    "0.7 c, reviews every 10": (0.7, 10),
}
SHOWN = ("none", "0.9")


def iterations(task: Task, seed: int, **settings: Any) -> dict[str, float]:
    """By average of the weights: iterations to the hardest target; infinity if the budget ends before."""
    run = AveragedRun(task, kfc("kfc", "KFC", rule="natural", **settings), 0.5, seed)
    while not (run.over() or all(run.arrived(name) for name in AVERAGES)):
        run.advance(5)
    return {name: run.curves[name].reach(task.targets[-1]).iterations for name in SHOWN}


def cell(found: Sequence[Mapping[str, float]]) -> str:
    """The medians over seeds, without and with an average."""
    return " · ".join(count([entry[name] for entry in found]) for name in SHOWN)


def row(task: Task, seeds: int) -> list[str]:
    """The cells of a task: for each variant, without and with an average."""
    cells = []
    for exponent, every in VARIANTS.values():
        with mock.patch.multiple(region, NEXT_SLOPE=exponent, REVIEW_EVERY_N_STEPS=every):
            found = [iterations(task, seed) for seed in range(seeds)]
        cells.append(cell(found))
    return cells


def main() -> None:
    """Measure, and write the table."""
    home = (TASKS["conv"].at(128), TASKS["conv_autoencoder"], TASKS["resnet"])
    title = "rule natural, without · with averaged weights (0.9)"
    measure(__doc__, "next_slope.md", title, list(VARIANTS), row, home)


if __name__ == "__main__":
    main()
