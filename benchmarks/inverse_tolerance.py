"""What skipped inverses cost in iterations: ``python -m benchmarks.inverse_tolerance``.

KFC with the callback's defaults on tasks and seeds of the contest, with one thing changed at a time: the iterations
until each training loss is reached, and the share of the inverses that were due, after each layer's first one, and
were skipped.

Written to ``results/inverse_tolerance.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import SHIPPED
from benchmarks.harness import Run, interleave
from benchmarks.optimizers import Contestant, KFCStepper, Stepper
from benchmarks.tasks import TASKS, Task
from lightning_kfc import KFC

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "`inverse_tolerance=0.1`": {"inverse_tolerance": 0.1},
    "`inverse_tolerance=0.2`": {"inverse_tolerance": 0.2},
    "`inverse_tolerance=0.4`": {"inverse_tolerance": 0.4},
}
RESULTS = Path(__file__).parent / "results" / "inverse_tolerance.md"


class Counted(KFCStepper):
    """Counts the inverses that were made, besides those that were skipped."""

    def __init__(self, kfc: KFC, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(kfc, optimizer)
        self.dates: set[tuple[str, int]] = set()

    def step(self, compute_loss: Any) -> None:
        """See :class:`Stepper`."""
        super().step(compute_loss)
        for name in self.kfc.layers:
            age = self.kfc.ages(name)[1]
            if age is not None:
                self.dates.add((name, self.kfc.step - age))

    def skipped(self) -> float:
        """The share of the inverses that were due after the first ones."""
        return self.kfc.inverses_skipped / (len(self.dates) - len(self.kfc.layers))


def measure(task: Task, seeds: list[int]) -> dict[str, list[tuple[list[int | None], float]]]:
    """By variant, for each seed, the iterations to each target, and the share that was skipped."""
    found: dict[str, list[tuple[list[int | None], float]]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        runs: list[Run] = []
        steppers: dict[str, Counted] = {}
        for name, settings in VARIANTS.items():
            runs.append(Run(task, Contestant(name, name, _making(name, settings, steppers), (0.5,)), 0.5, seed))
        interleave(runs, until=lambda run: min(run.curve.losses) <= task.targets[-1])
        for run in runs:
            reached = [_first(run, target) for target in task.targets]
            stepper = steppers[run.contestant.name]
            found[run.contestant.name].append((reached, stepper.skipped()))
    return found


def _making(
    name: str, settings: dict[str, Any], made: dict[str, Counted]
) -> Callable[[nn.Module, float, int], Stepper]:
    """What makes a variant, and keeps what it has made."""

    def make(model: nn.Module, rate: float, seed: int) -> Stepper:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)
        made[name] = Counted(KFC(model, seed=seed, **{**SHIPPED, **settings}), optimizer)
        return made[name]

    return make


def _first(run: Run, target: float) -> int | None:
    pairs = zip(run.curve.iterations, run.curve.losses, strict=True)
    return next((iteration for iteration, loss in pairs if loss <= target), None)


def table(task: Task, found: dict[str, list[tuple[list[int | None], float]]]) -> str:
    """A markdown table of the variants."""
    lines = ["| setting | skipped |" + "".join(f" iterations to {target:g} |" for target in task.targets)]
    lines.append("|---|---|" + "---|" * len(task.targets))
    for name, results in found.items():
        columns = zip(*(reached for reached, _ in results), strict=True)
        cells = [_cell([n for n in column if n is not None], len(results)) for column in columns]
        lines.append(f"| {name} | {100 * median(share for _, share in results):.0f}% | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(iterations: list[int], seeds: int) -> str:
    if len(iterations) < seeds:
        return f"{len(iterations)} of {seeds} seeds"
    return f"{median(iterations):g} ({min(iterations)} to {max(iterations)})"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=["autoencoder", "conv"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    parts = []
    for name in options.tasks:
        task = TASKS[name]
        title = f"**{task.title}, batch {task.batch_size}**; {len(options.seeds)} seeds: median (lowest to highest)"
        parts.append(f"{title}\n\n{table(task, measure(task, options.seeds))}\n")
        print(parts[-1], flush=True)
    options.results.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
