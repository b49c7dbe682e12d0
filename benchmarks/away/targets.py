"""Measure the tasks' targets: the training loss of tuned Adam at 70 % of the budget, median of three seeds.

Adam's learning rate is the one with the lowest such loss on a separate seed, on a grid of factor three that grows if
the best is at its edge. ``python -m benchmarks.away.targets [TASK ...]`` measures the missing targets, or the named
ones again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.away.averages import SPACING
from benchmarks.away.contestants import AWAY_CONTESTANTS
from benchmarks.away.tasks import AWAY, TARGETS
from benchmarks.contest.curves import at_edge
from benchmarks.contest.harness import Run, interleave
from benchmarks.contest.report import lists_on_one_line
from benchmarks.contest.tasks import Task
from benchmarks.contest.tuning import beyond, lowest_until

SHARE = 0.7
TUNING_SEED = 100
SEEDS = (0, 1, 2)
#: The largest number of extensions of a grid.
EXTENSIONS = 3


def reached(task: Task, settings: Sequence[tuple[float, int]]) -> list[float]:
    """The lowest training loss of Adam up to 70 % of the budget, for each learning rate and seed."""
    iterations = round(SHARE * task.budget)
    short = task.at(budget=iterations)
    runs = [Run(short, AWAY_CONTESTANTS["adam"], lr, seed, spacing=SPACING) for lr, seed in settings]
    interleave(runs)
    return [lowest_until(run.curve, iterations) for run in runs]


def measure(task: Task) -> dict[str, Any]:
    """A task's target, with its measurement."""
    tried: dict[float, float] = {}
    missing = list(AWAY_CONTESTANTS["adam"].grid)
    for _ in range(EXTENSIONS + 1):
        tried.update(zip(missing, reached(task, [(lr, TUNING_SEED) for lr in missing]), strict=True))
        best = min(tried, key=tried.__getitem__)
        if not at_edge(best, list(tried)):
            break
        missing = [beyond(list(tried), best)]
    losses = reached(task, [(best, seed) for seed in SEEDS])
    return {
        "target": float(f"{median(losses):.4g}"),
        "lr": best,
        "losses": [float(f"{loss:.4g}") for loss in losses],
        "tried": {f"{lr:.3g}": float(f"{tried[lr]:.4g}") for lr in sorted(tried)},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, saving after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *AWAY])
    named = parser.parse_args(sys.argv[1:] if arguments is None else arguments).tasks
    torch.set_num_threads(1)
    entries = json.loads(TARGETS.read_text()) if TARGETS.exists() else {}
    for name in named or [name for name in AWAY if name not in entries]:
        entries[name] = measure(AWAY[name])
        ordered = {known: entries[known] for known in AWAY if known in entries}
        TARGETS.write_text(lists_on_one_line(json.dumps(ordered, indent=1)) + "\n")
        print(name, entries[name], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
