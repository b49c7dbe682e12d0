"""The contest: iterations and CPU seconds of optimizers to a training loss.

``python -m benchmarks.contest.convergence tune TASK`` chooses the peers' learning rates, on seeds that are not
reported; ``compete TASK`` runs all contestants on the reported seeds; ``table`` writes tables and plots of all runs;
``run TASK``, or the task's name alone, does the missing pieces of the three.

After an interruption, the commands continue with the missing pieces: a contestant is a piece of the tuning, a seed one
of the contest. In a contest all contestants of a seed run interleaved, in blocks of steps, on one thread. Time is the
CPU time of the steps alone: batches are ready, evaluation is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contest.contestants import CONTESTANTS, USUAL
from benchmarks.contest.harness import compete
from benchmarks.contest.optimizers import Contestant
from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.plots import plot_all
from benchmarks.contest.report import Results, markdown, overview
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.contest.tuning import Tuning, tune

SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)


def tuning_file(folder: Path, task: Task) -> Path:
    """The file of a task's tuning."""
    return folder / f"tuning_{task.label}.json"


def contest_file(folder: Path, task: Task) -> Path:
    """The file of a task's contest."""
    return folder / f"contest_{task.label}.json"


def load_tuning(folder: Path, task: Task) -> Tuning:
    """A task's tuning; empty before its first piece."""
    path = tuning_file(folder, task)
    tuning = Tuning.load(path) if path.exists() else Tuning.of(task)
    tuning.check(task)
    return tuning


def tune_missing(
    task: Task, contestants: Sequence[Contestant], seeds: Sequence[int], folder: Path, pieces: int | None = None
) -> bool:
    """Tune contestants without trials, saving after each.

    Args:
        task: The task.
        contestants: The contestants; those without a grid are skipped.
        seeds: The seeds of the tuning.
        folder: The folder of results.
        pieces: The largest number of pieces; None for all.

    Returns:
        Whether all pieces are done.
    """
    tuning = load_tuning(folder, task)
    searched = [c for c in contestants if c.tuned and c.takes_from is None]
    missing = [c for c in searched if c.name not in tuning.trials]
    for contestant in missing[:pieces]:
        tune(task, contestant, seeds, tuning)
        tuning.save(tuning_file(folder, task))
        print(f"{task.label}, {contestant.title}: lr {tuning.choice(contestant.name):g}", flush=True)
    return pieces is None or len(missing) <= pieces


def learning_rates(
    task: Task, contestants: Sequence[Contestant], folder: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Each contestant's learning rate, with its search.

    Raises:
        ValueError: If a contestant was not tuned on this task.
    """
    tuning = load_tuning(folder, task)
    lrs, how = {}, {}
    for contestant in contestants:
        if not contestant.tuned:
            lrs[contestant.name] = contestant.grid[0]
            continue
        source = contestant.takes_from or contestant.name
        if source not in tuning.trials:
            raise ValueError(
                f"{contestant.title} has no learning rate on {task.label}: run "
                f"`python -m benchmarks.contest.convergence tune {task.name} --batch-size {task.batch_size}` first."
            )
        lrs[contestant.name] = tuning.choice(source)
        taken = f"takes {CONTESTANTS[source].title}'s learning rate."
        how[contestant.name] = tried(tuning, source) if source == contestant.name else taken
    return lrs, how


def tried(tuning: Tuning, name: str) -> str:
    """A sentence with all trials of a search."""
    cells = []
    for lr, trials in sorted(tuning.trials[name].items()):
        found = [trial.ended if trial.iterations is None else f"{trial.iterations:.0f}" for trial in trials]
        cells.append(f"{lr:g}: {'/'.join(found)}")
    edge = " **The choice is at the edge of what was tried.**" if tuning.unsettled(name) else ""
    return f"iterations to {tuning.target:g} by lr, one a tuning seed: {', '.join(cells)}.{edge}"


def compete_missing(
    task: Task,
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    folder: Path,
    pieces: int | None = None,
    again: Sequence[str] = (),
) -> bool:
    """Run the contestants on their missing seeds, saving after each seed.

    Args:
        task: The task.
        contestants: The contestants; those added later run interleaved with each other.
        seeds: The reported seeds.
        folder: The folder of results.
        pieces: The largest number of seeds; None for all.
        again: Names of contestants whose earlier runs are dropped.

    Returns:
        Whether all seeds are done.

    Raises:
        ValueError: If a contestant's learning rate has changed since its earlier runs.
    """
    path = contest_file(folder, task)
    goal = task.goal
    results = (
        Results.load(path)
        if path.exists()
        else Results(task.name, task.title, task.batch_size, goal.budget, goal.seconds, goal.targets)
    )
    for name in again:
        results.curves.pop(name, None)
    lrs, how = learning_rates(task, contestants, folder)
    for contestant in contestants:
        name, lr = contestant.name, lrs[contestant.name]
        if results.curves.get(name) and results.lrs[name] != lr:
            raise ValueError(
                f"{contestant.title} ran on {task.label} with lr {results.lrs[name]:g}, and is now tuned to {lr:g}: "
                f"add `--again {name}`."
            )
        results.titles[name], results.lrs[name] = contestant.title, lr
        if name in how:
            results.tuned[name] = how[name]
    missing = {seed: [c for c in contestants if seed not in results.curves.get(c.name, {})] for seed in seeds}
    missing = {seed: those for seed, those in missing.items() if those}
    for seed in list(missing)[:pieces]:
        for name, curve in compete(task, missing[seed], lrs, seed).items():
            results.curves.setdefault(name, {})[seed] = curve
        results.save(path)
        print(f"{task.label}, seed {seed}: {', '.join(c.name for c in missing[seed])}", flush=True)
    return pieces is None or len(missing) <= pieces


def write_tables(folder: Path, plots: Path) -> str:
    """Write the table and the plot of every contest, and the overview of all.

    Returns:
        The overview.
    """
    contests = [Results.load(path) for path in sorted(folder.glob("contest_*.json"))]
    order = {name: number for number, name in enumerate(TASKS)}
    contests.sort(key=lambda results: (order.get(results.task, len(order)), -results.batch_size))
    complete = [results for results in contests if results.seeds()]
    for results in complete:
        label = f"contest_{results.task}_b{results.batch_size}"
        (folder / f"{label}.md").write_text(markdown(results) + "\n")
    plot_all(complete, plots)
    text = overview(complete, (*USUAL, "kfc_adam", "kfc_natural"))
    (folder / "contest.md").write_text(text + "\n")
    return text


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of_pieces(__doc__)
    parser.add_argument("command", choices=("tune", "compete", "table", "run"))
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--batch-size", type=int, help="the task's first by default")
    parser.add_argument("--budget", type=int, help="iterations of each run; the task's own by default")
    parser.add_argument("--optimizers", nargs="+", choices=CONTESTANTS, default=USUAL)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=TUNING_SEEDS)
    parser.add_argument(
        "--again", nargs="+", choices=CONTESTANTS, default=(), help="forget these contestants' contests"
    )
    options = parser.parse_args(["run", *arguments] if arguments and arguments[0] in TASKS else arguments)
    if options.command != "table" and options.task is None:
        parser.error(f"{options.command} needs a task: {', '.join(TASKS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    options = _arguments(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    done = True
    if options.command != "table":
        task = TASKS[options.task].at(options.batch_size, options.budget)
        contestants = [CONTESTANTS[name] for name in options.optimizers]
        if options.command in ("tune", "run"):
            done = tune_missing(task, contestants, options.tuning_seeds, options.results, options.pieces)
        if options.command in ("compete", "run") and done:
            done = compete_missing(task, contestants, options.seeds, options.results, options.pieces, options.again)
    if options.command in ("table", "run") and done:
        print(write_tables(options.results, options.plots))
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
