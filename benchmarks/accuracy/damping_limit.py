"""Iterations to the targets by the limits of the automatic damping and of its updates.

The damping is limited to a multiple of a layer's mean curvature, the update to a multiple of its weights at the start.
Training loss of weights averaged with decay 0.9. The tasks are those that choose constants: half of the tasks away from
home, and some of the contest. Run it by ``python -m benchmarks.accuracy.damping_limit``.
"""

from __future__ import annotations

import math
from unittest import mock

from benchmarks.accuracy.damping_unit import DECAY, iterations
from benchmarks.accuracy.variants import count, measure
from benchmarks.contest.tasks import TASKS, Task
from lightning_kfc.curvature import own_damping
from lightning_kfc.factors import damping

#: Multiples of the mean curvature, and multiples of the size of the weights by which one update may change them.
VARIANTS = ((math.inf, 2.0), (10.0, 2.0), (100.0, 2.0), (300.0, 2.0), (100.0, 1.0), (100.0, math.inf))
#: CPU seconds of a run.
LONGEST = 45.0


def row(task: Task, seeds: int) -> list[str]:
    """The cells of a task, one a variant."""
    found = []
    for multiple, change in VARIANTS:
        with (
            mock.patch.object(damping, "LARGEST_DAMPING", multiple),
            mock.patch.object(own_damping, "LARGEST_CHANGE", change),
        ):
            found.append(count([iterations(task, seed, LONGEST) for seed in range(seeds)]))
    return found


def main() -> None:
    """Measure, and write the table."""
    autoencoder = TASKS["autoencoder"]
    home = (TASKS["conv"].at(128), TASKS["conv_autoencoder"], autoencoder.at(512), autoencoder.at(128), TASKS["vit"])
    variants = [f"{multiple:g} curvature, {change:g} weights" for multiple, change in VARIANTS]
    measure(__doc__, "damping_limit.md", f"weights averaged with decay {DECAY}", variants, row, home)


if __name__ == "__main__":
    main()
