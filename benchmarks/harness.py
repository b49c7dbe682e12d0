"""Runs contestants on a task, interleaved, and measures each one's loss against iterations and CPU seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.curves import Curve, best_of_grid
from benchmarks.optimizers import Contestant
from benchmarks.tasks import Task

#: Steps that one run makes before the next one's turn: a disturbance of the machine then meets them all.
BLOCK = 5


def evaluation_due(iteration: int) -> bool:
    """Whether the loss is evaluated after this iteration: always at first, where it moves fastest, then more rarely."""
    if iteration <= 20:
        return True
    return iteration % (2 if iteration <= 60 else 5) == 0


class Run:
    """One contestant with one learning rate and seed; advances when asked to.

    The seed sets the initial weights and the order of the examples, the same for all contestants.
    """

    def __init__(self, task: Task, contestant: Contestant, lr: float, seed: int) -> None:
        self.task = task
        self.contestant = contestant
        self.lr = lr
        self.seed = seed
        torch.manual_seed(seed)
        self.model = task.make_model()
        self.curve = Curve()
        self._stepper = contestant.make(self.model, lr, seed)
        self._batches = task.batches(seed)
        self._iteration = 0
        self._seconds = 0.0
        self.curve.append(0, 0.0, task.training_loss(self.model))

    def advance(self, steps: int) -> None:
        """Make so many more steps, fewer if the budget ends or the run diverges."""
        for _ in range(steps):
            if self.over():
                return
            inputs, targets = next(self._batches)
            started = time.process_time()
            self._stepper.step(lambda x=inputs, y=targets: self.task.loss(self.model(x), y))
            self._seconds += time.process_time() - started
            self._iteration += 1
            if evaluation_due(self._iteration) or self._iteration == self.task.budget:
                self.curve.append(self._iteration, self._seconds, self.task.training_loss(self.model))

    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self._iteration >= self.task.budget or self.curve.diverged()


def interleave(runs: Sequence[Run], until: Callable[[Run], bool] = Run.over, block: int = BLOCK) -> None:
    """Advance all runs by turns, a block of steps each, until all are over or where the caller wants them."""
    going = list(runs)
    while going:
        for run in going:
            run.advance(block)
        going = [run for run in going if not (run.over() or until(run))]


def tune(task: Task, contestants: Sequence[Contestant], seeds: Sequence[int]) -> dict[str, dict[float, list[Curve]]]:
    """Run every learning rate of every contestant, all with the same budget; each stops at the hardest target.

    Args:
        task: The task.
        contestants: Those whose grid is to be searched.
        seeds: Seeds of the runs; others than those that are reported.

    Returns:
        By contestant and learning rate, a curve a seed.
    """
    curves: dict[str, dict[float, list[Curve]]] = {}
    for seed in seeds:
        runs = [Run(task, contestant, lr, seed) for contestant in contestants for lr in contestant.grid]
        interleave(runs, until=lambda run: run.curve.losses[-1] <= task.targets[-1])
        for run in runs:
            curves.setdefault(run.contestant.name, {}).setdefault(run.lr, []).append(run.curve)
    return curves


def choose(
    tuning: dict[str, dict[float, list[Curve]]], contestants: Sequence[Contestant], target: float
) -> dict[str, float]:
    """Each contestant's learning rate: the best of its grid, or the only one it has."""
    return {
        contestant.name: best_of_grid(tuning[contestant.name], target) if contestant.tuned else contestant.grid[0]
        for contestant in contestants
    }


def compete(
    task: Task, contestants: Sequence[Contestant], lrs: dict[str, float], seeds: Sequence[int]
) -> dict[str, list[Curve]]:
    """Run all contestants with their learning rates over the whole budget, the seeds one after another.

    Returns:
        By contestant, a curve a seed.
    """
    curves: dict[str, list[Curve]] = {contestant.name: [] for contestant in contestants}
    for seed in seeds:
        runs = [Run(task, contestant, lrs[contestant.name], seed) for contestant in contestants]
        interleave(runs)
        for run in runs:
            curves[run.contestant.name].append(run.curve)
    return curves
