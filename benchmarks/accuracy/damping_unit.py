"""Iterations to the targets by the constant of the automatic damping, and with one number for all layers.

Training loss of weights averaged with decay 0.9. The tasks are those that choose constants: half of the tasks away from
home, and some of the contest. Run it by ``python -m benchmarks.accuracy.damping_unit``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from benchmarks.accuracy.variants import count, measure
from benchmarks.contest.contestants import kfc
from benchmarks.contest.harness import Run
from benchmarks.contest.tasks import TASKS, Task
from lightning_kfc.trust_region import region

CONSTANTS = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5)
#: The former initial value of an automatic damping, in the loss's units.
NUMBER = 0.003
DECAY = 0.9


def iterations(task: Task, seed: int, seconds: float | None = None, **settings: Any) -> float:
    """Iterations to the hardest target; infinity if the budget, or the CPU seconds, end before."""
    run = Run(task, kfc("kfc", "KFC", average=DECAY, rule="natural", **settings), 0.5, seed, seconds=seconds)
    target = task.targets[-1]
    while not run.over() and min(run.curve.losses) > target:
        run.advance(5)
    return run.curve.reach(target).iterations


def row(task: Task, seeds: int) -> list[str]:
    """The cells of a task: for the number, then for each constant."""
    found = [count([iterations(task, seed, damping=NUMBER) for seed in range(seeds)])]
    for constant in CONSTANTS:
        with mock.patch.object(region, "DAMPING", constant):
            found.append(count([iterations(task, seed) for seed in range(seeds)]))
    return found


def main() -> None:
    """Measure, and write the table."""
    home = (TASKS["conv"].at(512), TASKS["conv"].at(128), TASKS["conv_autoencoder"], TASKS["resnet"])
    variants = [f"damping {NUMBER}", *(f"{constant:g} h / w²" for constant in CONSTANTS)]
    measure(__doc__, "damping_unit.md", f"weights averaged with decay {DECAY}", variants, row, home)


if __name__ == "__main__":
    main()
