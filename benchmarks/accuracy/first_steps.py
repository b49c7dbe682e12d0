"""Iterations to the targets with fewer reviews, a shorter warm-up or longer periods in the first steps.

The tasks are those that choose constants, as in :mod:`benchmarks.accuracy.damping_unit`. Run it by
``python -m benchmarks.accuracy.first_steps``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from benchmarks.accuracy.next_slope import cell, iterations
from benchmarks.accuracy.variants import measure
from benchmarks.contest.tasks import TASKS, Task
from lightning_kfc.trust_region import region

#: By title: the number of first steps that are all reviewed, and settings.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "as shipped": (5, {}),
    "reviews of the first 10": (10, {}),
    "a warm-up of 6 steps": (5, {"warmup_steps": 6}),
    "periods of 20 and 40": (5, {"factor_every_n_steps": 20, "inverse_every_n_steps": 40}),
}


def row(task: Task, seeds: int) -> list[str]:
    """The cells of a task: for each variant, without and with an average."""
    cells = []
    for reviewed, settings in VARIANTS.values():
        with mock.patch.object(region, "REVIEWED_AT_FIRST", reviewed):
            found = [iterations(task, seed, **settings) for seed in range(seeds)]
        cells.append(cell(found))
    return cells


def main() -> None:
    """Measure, and write the table."""
    title = "rule natural, without · with averaged weights (0.9)"
    home = (TASKS["conv"].at(128), TASKS["conv_autoencoder"])
    measure(__doc__, "first_steps.md", title, list(VARIANTS), row, home)


if __name__ == "__main__":
    main()
