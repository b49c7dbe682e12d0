"""Iterations to the targets with fewer statistics, more reviews, a shorter warm-up or longer periods at first.

The tasks are those that choose constants, as in :mod:`benchmarks.accuracy.damping_unit`. Run it by
``python -m benchmarks.accuracy.first_steps``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from benchmarks.accuracy.next_slope import cell, iterations
from benchmarks.accuracy.variants import measure
from benchmarks.contest.tasks import TASKS, Task
from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.trust_region import region


def statistics_with_inverses_alone() -> AbstractContextManager[Any]:
    """Statistics at those steps of the warm-up alone at which inverses are refreshed."""
    dates = RefreshSchedule.factors_due

    def due(schedule: RefreshSchedule, step: int) -> bool:
        return dates(schedule, step) and (step >= schedule.warmup_steps or schedule.inverses_due(step))

    return mock.patch.object(RefreshSchedule, "factors_due", due)


#: By title: the changed constant or method, and settings.
VARIANTS: dict[str, tuple[AbstractContextManager[Any], dict[str, Any]]] = {
    "as shipped": (nullcontext(), {}),
    "statistics at 7 of the first 10": (statistics_with_inverses_alone(), {}),
    "reviews of the first 10": (mock.patch.object(region, "REVIEWED_AT_FIRST", 10), {}),
    "a warm-up of 6 steps": (nullcontext(), {"warmup_steps": 6}),
    "periods of 20 and 40": (nullcontext(), {"factor_every_n_steps": 20, "inverse_every_n_steps": 40}),
}


def row(task: Task, seeds: int) -> list[str]:
    """The cells of a task: for each variant, without and with an average."""
    cells = []
    for change, settings in VARIANTS.values():
        with change:
            found = [iterations(task, seed, **settings) for seed in range(seeds)]
        cells.append(cell(found))
    return cells


def main() -> None:
    """Measure, and write the table."""
    title = "rule natural, without · with averaged weights (0.9)"
    home = (TASKS["conv"].at(512), TASKS["conv"].at(128), TASKS["conv_autoencoder"])
    measure(__doc__, "first_steps.md", title, list(VARIANTS), row, home)


if __name__ == "__main__":
    main()
