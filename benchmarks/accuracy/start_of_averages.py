"""Iterations to the targets by the power of the average of the weights in its first steps.

The training loss is that of weights averaged with decay 0.9. Power 0 is the mean of the first ten steps. The tasks are
those that choose constants: half of the tasks away from home, and some of the contest. Run it by
``python -m benchmarks.accuracy.start_of_averages``.
"""

from __future__ import annotations

from functools import partial

from benchmarks.accuracy.variants import count, measure
from benchmarks.away.averages import NONE, Average, AveragedRun
from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.tasks import TASKS, Task

DECAY = 0.9
#: By title: the averages, all of one run.
VARIANTS = {f"power {power}": partial(Average, decay=DECAY, power=power) for power in (0, 5, 9, 20)}


def iterations(task: Task, seed: int) -> dict[str, float]:
    """By average of the weights: iterations to the hardest target; infinity if the budget ends before."""
    run = AveragedRun(task, CONTESTANTS["kfc"], 0.5, seed, averages=VARIANTS)
    while not (run.over() or all(map(run.arrived, run.curves))):
        run.advance(5)
    return {name: curve.reach(task.targets[-1]).iterations for name, curve in run.curves.items()}


def row(task: Task, seeds: int) -> list[str]:
    """The cells of a task: without an average, then for each power."""
    found = [iterations(task, seed) for seed in range(seeds)]
    return [count([entry[name] for entry in found]) for name in (NONE, *VARIANTS)]


def main() -> None:
    """Measure, and write the table."""
    home = (TASKS["conv"].at(512), TASKS["conv"].at(128), TASKS["conv_autoencoder"], TASKS["autoencoder"].at(512))
    variants = ["no average", *VARIANTS]
    measure(__doc__, "start_of_averages.md", f"weights averaged with decay {DECAY}", variants, row, home)


if __name__ == "__main__":
    main()
