"""Which optimizer reaches a training loss first: ``python -m benchmarks.convergence conv``.

Every contestant has its learning rate chosen on its own grid (the same number of values and the same budget
each; KFC runs at its defaults), on seeds other than the reported ones. Then all run interleaved, in blocks of
steps, on one thread. Time is the CPU time of the steps alone: batches are ready, evaluation is not counted.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks.curves import Curve
from benchmarks.harness import choose, compete, tune
from benchmarks.optimizers import CONTESTANTS
from benchmarks.plots import plot_convergence
from benchmarks.report import Results, markdown
from benchmarks.tasks import TASKS

ROOT = Path(__file__).parent.parent


def iterations_by_lr(
    curves: dict[str, dict[float, list[Curve]]], target: float
) -> dict[str, dict[str, list[float | None]]]:
    """What the search for learning rates saw: iterations to the target, None for never."""

    def rounded(iterations: float) -> float | None:
        return None if math.isinf(iterations) else round(iterations, 1)

    return {
        name: {f"{lr:g}": [rounded(curve.reach(target).iterations) for curve in runs] for lr, runs in grid.items()}
        for name, grid in curves.items()
    }


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark and write ``benchmarks/results`` and ``docs/_static``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", choices=CONTESTANTS, default=["sgd", "adam", "kfc"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--budget", type=int, help="iterations of each run; the task's own by default")
    parser.add_argument("--keep-tuning", action="store_true", help="take the learning rates of the saved results")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "_static")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    task = TASKS[options.task]
    if options.budget is not None:
        task = task.shortened(options.budget)
    contestants = [CONTESTANTS[name] for name in options.optimizers]
    saved = options.results / f"convergence_{task.name}.json"
    if options.keep_tuning:
        earlier = Results.load(saved)
        tuning_seeds, tuning, lrs = earlier.tuning_seeds, earlier.tuning, earlier.lrs
    else:
        tuning_seeds = options.tuning_seeds
        curves = tune(task, [contestant for contestant in contestants if contestant.tuned], tuning_seeds)
        tuning, lrs = iterations_by_lr(curves, task.targets[-1]), choose(curves, contestants, task.targets[-1])
    print(f"Learning rates: {lrs}", flush=True)
    results = Results(
        task=task.name,
        title=task.title,
        batch_size=task.batch_size,
        budget=task.budget,
        targets=task.targets,
        seeds=options.seeds,
        tuning_seeds=tuning_seeds,
        titles={contestant.name: contestant.title for contestant in contestants},
        grids={contestant.name: contestant.grid for contestant in contestants},
        lrs=lrs,
        tuning=tuning,
        curves=compete(task, contestants, lrs, options.seeds),
    )
    results.save(saved)
    plot_convergence(results, options.plots / f"convergence_{task.name}.svg")
    table = markdown(results)
    (options.results / f"convergence_{task.name}.md").write_text(table + "\n")
    print(table)
    return results


if __name__ == "__main__":
    main()
