"""The search for each peer's learning rate: fewest iterations to the task's hardest training loss.

On the first tuning seed all learning rates of a grid run side by side. A run ends at the target, where it diverges, at
the budget of iterations or CPU seconds, or where it is hopeless:

- another learning rate of the same optimizer got there, and this run has made ``PATIENCE`` times as many iterations;
- a quarter of the budget is spent, none got there yet, and three others of the same optimizer were at a lower loss.

Neither rule looks at another optimizer. If the best is at the grid's edge, the grid grows beyond it. On further tuning
seeds, the learning rates that came within ``PATIENCE`` of the best run again (the best two, where none got there); if
none of them gets there on every seed, that is, where the best is at the edge of stability, the next lower one runs too.
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
#: CPU seconds of a run, as a multiple of those in the contest: a busy machine shall not decide.
LENIENCE = 1.25
#: Evaluations of the loss are half as many as in the contest.
SPACING = 8
#: The share of the budget after which, as long as none has got there, only the best ``SURVIVORS`` of a grid go on.
TRIAL_SHARE = 0.25
SURVIVORS = 3
#: How often a grid may grow at an edge.
EXTENSIONS = 6
#: How many further learning rates are tried where none is stable.
STEPS_DOWN = 2


@dataclass(frozen=True)
class Trial:
    """One run of the search.

    Attributes:
        seed: Of the run.
        iterations: To the target; None if it was not reached.
        steps: Iterations made.
        loss: The last training loss; None where it is not finite.
        ended: By what: ``"target"``, ``"budget"``, ``"diverged"`` or ``"hopeless"``.
    """

    seed: int
    iterations: float | None
    steps: int
    loss: float | None
    ended: str

    @property
    def last_loss(self) -> float:
        """The last loss as it counts in a comparison: infinite where the run diverged."""
        return math.inf if self.loss is None or self.ended == "diverged" else self.loss


@dataclass
class Tuning:
    """All trials of one task.

    Attributes:
        task: The task's name.
        batch_size: Examples in a batch.
        target: The training loss to reach.
        budget: Iterations a run may make.
        trials: By contestant and learning rate, a trial a seed.
    """

    task: str
    batch_size: int
    target: float
    budget: int
    trials: dict[str, dict[float, list[Trial]]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> Tuning:
        """An empty one."""
        return cls(task.name, task.batch_size, task.targets[-1], task.budget)

    def save(self, path: Path) -> None:
        """Write JSON, with the versions that were used."""
        entries: dict[str, Any] = dict(vars(self))
        entries["trials"] = {
            name: {f"{lr:g}": _columns(trials) for lr, trials in sorted(grid.items())}
            for name, grid in self.trials.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lists_on_one_line(json.dumps({**entries, "measured_with": measured_with()}, indent=1)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tuning:
        """Read what :meth:`save` wrote."""
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
        """Refuse to be used for another target.

        Raises:
            ValueError: If the task's target or budget is not the one that was tuned for.
        """
        if (self.target, self.budget) != (task.targets[-1], task.budget):
            raise ValueError(
                f"{task.label} was tuned for a loss of {self.target:g} in {self.budget} iterations, and now asks for "
                f"{task.targets[-1]:g} in {task.budget}: delete its tuning file and tune again."
            )

    def choice(self, name: str) -> float:
        """The learning rate that got there on most seeds, in the fewest iterations on average.

        Only those count that were tried on the most seeds. Where none got there, the lowest last loss; where
        all diverged, the lowest learning rate.
        """
        grid = self.trials[name]
        most = max(len(trials) for trials in grid.values())

        def score(lr: float) -> tuple[int, float, float]:
            reached = [trial.iterations for trial in grid[lr] if trial.iterations is not None]
            losses = [trial.last_loss for trial in grid[lr]]
            return -len(reached), fmean(reached) if reached else 0.0, 0.0 if reached else fmean(losses)

        return min(sorted(lr for lr, trials in grid.items() if len(trials) == most), key=score)

    def unsettled(self, name: str) -> bool:
        """Whether the choice is at the edge of what was tried, where a better one may lie beyond."""
        return at_edge(self.choice(name), list(self.trials[name]))


def _columns(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    return {entry.name: [getattr(trial, entry.name) for trial in trials] for entry in fields(Trial)}


class Search:
    """The trials of one contestant on one seed.

    Args:
        task: What is trained.
        contestant: Whose learning rate is searched.
        seed: Of all that is random.
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
    """The lowest loss up to an iteration, which a passing spike does not hide; infinite where the run diverged."""
    if curve.diverged():
        return math.inf
    return min(loss for made, loss in zip(curve.iterations, curve.losses, strict=True) if made <= iteration)


def tune(task: Task, contestant: Contestant, seeds: Sequence[int], tuning: Tuning) -> None:
    """Search a contestant's learning rate and put the trials into ``tuning``, in place of earlier ones."""
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
    """The next learning rate outside a grid, at the distance (as a ratio) of its two last ones."""
    ordered = sorted(grid)
    nearest, inner = (ordered[0], ordered[1]) if edge == ordered[0] else (ordered[-1], ordered[-2])
    return float(f"{nearest * nearest / inner:.6g}")


def promising(trials: Mapping[float, Trial]) -> list[float]:
    """The learning rates that came close to the best on one seed."""
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
