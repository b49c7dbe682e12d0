"""The search for each peer's learning rate: fewest iterations to the task's hardest training loss.

On the first tuning seed all learning rates of a grid run side by side. A run ends at the target, on divergence, at the
budget of iterations or CPU seconds, or if it is hopeless:

- another learning rate of the same optimizer reached the target, and this run has made ``PATIENCE`` times as many
  iterations;
- a quarter of the budget is spent, no run reached the target, and three others of the same optimizer had a lower loss.

No rule compares two optimizers. If the best is at the grid's edge, the grid grows. On further tuning seeds, the
learning rates within ``PATIENCE`` of the best run again (the best two, if none reached the target). If none of them
reaches the target on every seed, the best is at the edge of stability, and the next lower one runs too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.contest.curves import Curve, at_edge
from benchmarks.contest.harness import Run, interleave
from benchmarks.contest.optimizers import Contestant
from benchmarks.contest.report import lists_on_one_line, measured_with
from benchmarks.contest.tasks import Task

PATIENCE = 1.25
#: CPU seconds of a run, as a multiple of those in the contest, so that a busy machine does not decide.
LENIENCE = 1.25
#: The spacing of evaluations, half as many as in the contest.
SPACING = 8
#: The share of the budget after which, before any run has reached the target, the best ``SURVIVORS`` continue.
TRIAL_SHARE = 0.25
SURVIVORS = 3
#: The largest number of extensions of a grid.
EXTENSIONS = 6
#: The number of lower learning rates that are tried if none is stable.
STEPS_DOWN = 2


@dataclass(frozen=True)
class Trial:
    """One run of the search.

    Attributes:
        seed: The seed of the run.
        iterations: Iterations to the target; None if it was not reached.
        steps: The number of iterations.
        loss: The last training loss; None if it is not finite.
        ended: The reason of its end: ``"target"``, ``"budget"``, ``"diverged"`` or ``"hopeless"``.
    """

    seed: int
    iterations: float | None
    steps: int
    loss: float | None
    ended: str

    @property
    def last_loss(self) -> float:
        """The last loss in comparisons; infinite if the run diverged."""
        return math.inf if self.loss is None or self.ended == "diverged" else self.loss


@dataclass
class Tuning:
    """All trials of one task.

    Attributes:
        task: The task's name.
        batch_size: Examples in a batch.
        target: The training loss to reach.
        budget: The largest number of iterations of a run.
        trials: The trials of the seeds, by contestant and learning rate.
    """

    task: str
    batch_size: int
    target: float
    budget: int
    trials: dict[str, dict[float, list[Trial]]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> Tuning:
        """The empty tuning of a task."""
        return cls(task.name, task.batch_size, task.targets[-1], task.budget)

    def save(self, path: Path) -> None:
        """Write JSON with the used versions."""
        entries: dict[str, Any] = dict(vars(self))
        entries["trials"] = {
            name: {f"{lr:g}": _columns(trials) for lr, trials in sorted(grid.items())}
            for name, grid in self.trials.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lists_on_one_line(json.dumps({**entries, "measured_with": measured_with()}, indent=1)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tuning:
        """Load a file of :meth:`save`."""
        entries = json.loads(path.read_text())
        del entries["measured_with"]
        entries["trials"] = {
            name: {
                float(lr): [Trial(*values) for values in zip(*columns.values(), strict=True)]
                for lr, columns in grid.items()
            }
            for name, grid in entries["trials"].items()
        }
        return cls(**entries)

    def check(self, task: Task) -> None:
        """Require the task's target and budget to be those of the tuning.

        Raises:
            ValueError: If they differ.
        """
        if (self.target, self.budget) != (task.targets[-1], task.budget):
            raise ValueError(
                f"{task.label} was tuned for a loss of {self.target:g} in {self.budget} iterations, and now needs "
                f"{task.targets[-1]:g} in {task.budget}: delete its tuning file and tune again."
            )

    def choice(self, name: str) -> float:
        """The learning rate that reached the target on most seeds, in the fewest iterations on average.

        Only learning rates with the most seeds count. If none reached the target, the one with the lowest last loss is
        chosen; if all diverged, the lowest learning rate.
        """
        grid = self.trials[name]
        most = max(len(trials) for trials in grid.values())

        def score(lr: float) -> tuple[int, float, float]:
            reached = [trial.iterations for trial in grid[lr] if trial.iterations is not None]
            losses = [trial.last_loss for trial in grid[lr]]
            return -len(reached), fmean(reached) if reached else 0.0, 0.0 if reached else fmean(losses)

        return min(sorted(lr for lr, trials in grid.items() if len(trials) == most), key=score)

    def unsettled(self, name: str) -> bool:
        """Whether the choice is at the edge of the tried ones, so that a better one may lie outside."""
        return at_edge(self.choice(name), list(self.trials[name]))


def _columns(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    return {entry.name: [getattr(trial, entry.name) for trial in trials] for entry in fields(Trial)}


class Search:
    """The trials of one contestant on one seed.

    Args:
        task: The task.
        contestant: The contestant.
        seed: The seed of all random numbers.
        make_run: Makes a run, with the arguments of :class:`Run`.
    """

    def __init__(self, task: Task, contestant: Contestant, seed: int, make_run: Callable[..., Run] = Run) -> None:
        self._task, self._contestant, self._seed, self._make_run = task, contestant, seed, make_run
        self._limit = LENIENCE * task.goal.seconds
        self._curves: dict[float, Curve] = {}
        self._best = math.inf
        self.trials: dict[float, Trial] = {}

    def run(self, lrs: Iterable[float]) -> None:
        """Run these learning rates side by side."""
        options = {"seconds": self._limit, "spacing": SPACING}
        runs = [self._make_run(self._task, self._contestant, lr, self._seed, **options) for lr in lrs]
        self._curves.update({run.lr: run.curve for run in runs})
        interleave(runs, until=lambda run: self._arrived(run) or self._hopeless(run), block=1)
        for run in runs:
            self.trials[run.lr] = self._trial(run)

    def _arrived(self, run: Run) -> bool:
        reached = run.curve.reach(self._task.targets[-1]).iterations
        self._best = min(self._best, reached)
        return math.isfinite(reached)

    def _hopeless(self, run: Run) -> bool:
        made = run.curve.iterations[-1]
        if math.isfinite(self._best):
            return made >= PATIENCE * self._best
        spent = max(made / self._task.budget, run.curve.seconds[-1] / self._limit)
        if spent < TRIAL_SHARE:
            return False
        own = lowest_until(run.curve, made)
        better = [curve for curve in self._curves.values() if lowest_until(curve, made) < own]
        return len(better) >= SURVIVORS

    def _trial(self, run: Run) -> Trial:
        reached, loss = run.curve.reach(self._task.targets[-1]).iterations, run.curve.losses[-1]
        ended = "budget" if run.over() else "hopeless"
        if run.curve.diverged():
            ended = "diverged"
        if math.isfinite(reached):
            ended = "target"
        return Trial(
            seed=self._seed,
            iterations=round(reached, 1) if math.isfinite(reached) else None,
            steps=run.curve.iterations[-1],
            loss=float(f"{loss:.4g}") if math.isfinite(loss) else None,
            ended=ended,
        )


def lowest_until(curve: Curve, iteration: int) -> float:
    """The lowest loss up to an iteration; infinite if the run diverged."""
    if curve.diverged():
        return math.inf
    return min(loss for made, loss in zip(curve.iterations, curve.losses, strict=True) if made <= iteration)


def tune(task: Task, contestant: Contestant, seeds: Sequence[int], tuning: Tuning) -> None:
    """Search a contestant's learning rate, and replace its trials in ``tuning``."""
    grid: dict[float, list[Trial]] = {}
    tuning.trials[contestant.name] = grid
    first = Search(task, contestant, seeds[0])
    first.run(contestant.grid)
    _record(grid, first.trials)
    for _ in range(EXTENSIONS):
        if not tuning.unsettled(contestant.name):
            break
        first.run([beyond(list(grid), tuning.choice(contestant.name))])
        _record(grid, {lr: trial for lr, trial in first.trials.items() if lr not in grid})
    candidates = promising(first.trials)
    _try_again(task, contestant, seeds[1:], candidates, grid)
    for _ in range(STEPS_DOWN):
        if any(all(trial.iterations is not None for trial in grid[lr]) for lr in candidates):
            break
        lower = [lr for lr in grid if lr < min(candidates)]
        if not lower or all(trial.iterations is None for trials in grid.values() for trial in trials):
            break
        candidates = [max(lower)]
        del grid[candidates[0]]
        _try_again(task, contestant, seeds, candidates, grid)


def beyond(grid: Sequence[float], edge: float) -> float:
    """The next learning rate outside a grid, at the ratio of its two last ones."""
    ordered = sorted(grid)
    nearest, inner = (ordered[0], ordered[1]) if edge == ordered[0] else (ordered[-1], ordered[-2])
    return float(f"{nearest * nearest / inner:.6g}")


def promising(trials: Mapping[float, Trial]) -> list[float]:
    """The learning rates close to the best on one seed."""
    reached = {lr: trial.iterations for lr, trial in trials.items() if trial.iterations is not None}
    if reached:
        return sorted(lr for lr, iterations in reached.items() if iterations <= PATIENCE * min(reached.values()))
    return sorted(trials, key=lambda lr: (trials[lr].last_loss, lr))[:2]


def _try_again(
    task: Task, contestant: Contestant, seeds: Sequence[int], lrs: Sequence[float], grid: dict[float, list[Trial]]
) -> None:
    for seed in seeds:
        search = Search(task, contestant, seed)
        search.run(lrs)
        _record(grid, search.trials)


def _record(grid: dict[float, list[Trial]], trials: Mapping[float, Trial]) -> None:
    for lr, trial in trials.items():
        grid.setdefault(lr, []).append(trial)
