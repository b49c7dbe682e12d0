"""The contest on tasks away from home, and the contest at home with averages of the weights.

``python -m benchmarks.away.contest --tasks choosing`` runs the half that may choose constants, ``--tasks held-back``
the other half, which is run once, at the end. Each peer's learning rate and average of weights (none, 0.8, 0.9) are
those with the fewest iterations to the target on one seed; KFC has no search, and all its averages are reported.
``--tasks home`` runs the contest's own tasks; the searched learning rates are the one tuned there, and twice that.

Results are saved after each run, and the same command continues after an interruption. The contestants of one command
run interleaved on each task and seed, so name them together to compare CPU seconds. ``--again`` drops the named
contestants' runs, not their searches.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.away.averages import AVERAGES, AveragedRun
from benchmarks.away.contestants import AWAY_CONTESTANTS, KFC_VARIANTS
from benchmarks.away.records import Entry, Outcome, Record, ahead, missed, table
from benchmarks.away.tasks import AWAY, CHOOSING, HELD_BACK
from benchmarks.contest.convergence import load_tuning
from benchmarks.contest.curves import Curve, at_edge
from benchmarks.contest.harness import interleave
from benchmarks.contest.optimizers import Contestant
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.contest.tuning import Search, beyond
from benchmarks.paths import RESULTS

#: The tasks of the contest at home, by label.
HOME = {task.at(size).label: task.at(size) for task in TASKS.values() for size in task.goals}
GROUPS: dict[str, dict[str, Task]] = {
    "choosing": {name: AWAY[name] for name in CHOOSING},
    "held-back": {name: AWAY[name] for name in HELD_BACK},
    "home": HOME,
}
SEEDS = (0, 1, 2)
TUNING_SEED = 100
#: The largest number of extensions of a grid.
EXTENSIONS = 3


def record_file(folder: Path, task: Task) -> Path:
    """The file of a task's record."""
    return folder / (f"home_{task.label}.json" if task.label in HOME else f"away_{task.name}.json")


def load_record(folder: Path, task: Task) -> Record:
    """A task's record; empty before the first measurement.

    Raises:
        ValueError: If the task has no target, or another one than the record.
    """
    target = task.targets[-1]
    if math.isinf(target):
        raise ValueError(f"{task.name} has no target: run `python -m benchmarks.away.targets {task.name}` first.")
    path = record_file(folder, task)
    if not path.exists():
        return Record(task.name, task.title, task.batch_size, target, task.budget)
    record = Record.load(path)
    if (record.target, record.budget) != (target, task.budget):
        raise ValueError(
            f"{task.name} was measured to a loss of {record.target:g} in {record.budget} iterations, and now needs "
            f"{target:g} in {task.budget}: delete {path.name} and run again."
        )
    return record


def with_searched_rates(task: Task, contestant: Contestant) -> Contestant:
    """The contestant with its grid for a task: at home, the tuned learning rate and twice that."""
    if task.label not in HOME:
        return contestant
    lr = load_tuning(RESULTS, task).choice(contestant.name)
    return replace(contestant, grid=(lr, 2 * lr))


def search(task: Task, contestant: Contestant, entry: Entry) -> None:
    """Choose a contestant's learning rate and average of weights, and add all trials to its entry.

    A grid of at least three learning rates grows if the best is at its edge.
    """
    runs: dict[float, AveragedRun] = {}

    def make_run(task: Task, contestant: Contestant, lr: float, seed: int, seconds: float, spacing: int) -> AveragedRun:
        runs[lr] = AveragedRun(task, contestant, lr, seed, seconds, spacing)
        return runs[lr]

    trials = Search(task, contestant, TUNING_SEED, make_run)

    def score(lr: float) -> tuple[float, float]:
        trial = trials.trials[lr]
        return (math.inf, trial.last_loss) if trial.iterations is None else (trial.iterations, 0.0)

    missing = list(contestant.grid)
    for _ in range(EXTENSIONS + 1):
        trials.run(missing)
        best = min(trials.trials, key=score)
        if len(contestant.grid) < 3 or not at_edge(best, list(trials.trials)):
            break
        missing = [beyond(list(trials.trials), best)]
    target = task.targets[-1]
    reached = {lr: {name: run.curves[name].reach(target).iterations for name in AVERAGES} for lr, run in runs.items()}
    entry.lr = best
    entry.average = min(AVERAGES, key=lambda name: (reached[best][name], runs[best].curves[name].losses[-1]))
    entry.search = {f"{lr:.3g}": {name: _or_none(reached[lr][name]) for name in AVERAGES} for lr in sorted(reached)}


def compete(task: Task, contestants: Sequence[Contestant], record: Record, seed: int) -> None:
    """Run contestants interleaved on one seed, and add the outcomes to the record.

    A run ends when its reported average, or else all averages have reached the target; at the budget; or out of time.
    """
    runs = []
    for contestant in contestants:
        lr = record.entries[contestant.name].lr
        assert lr is not None, f"no learning rate of {contestant.name} is known"
        runs.append(AveragedRun(task, contestant, lr, seed, task.goal.seconds))
    reported = {name: AVERAGES if entry.average is None else (entry.average,) for name, entry in record.entries.items()}
    interleave(runs, until=lambda run: all(run.arrived(average) for average in reported[run.contestant.name]))
    for run in runs:
        outcomes = {name: outcome(run.curves[name], task.targets[-1]) for name in AVERAGES}
        record.entries[run.contestant.name].runs[str(seed)] = outcomes


def outcome(curve: Curve, target: float) -> Outcome:
    """The outcome of a curve."""
    reach, loss = curve.reach(target), curve.losses[-1]
    four_digits = float(f"{loss:.4g}") if math.isfinite(loss) else None
    return Outcome(_or_none(reach.iterations), _or_none(reach.seconds, 3), curve.iterations[-1], four_digits)


def _or_none(value: float, digits: int = 1) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def run_missing(
    tasks: Sequence[Task], contestants: Sequence[Contestant], seeds: Sequence[int], folder: Path, again: Sequence[str]
) -> None:
    """Search missing learning rates, then make the missing runs, saving after each."""
    for task in tasks:
        record = load_record(folder, task)
        for contestant in contestants:
            entry = record.entries.setdefault(contestant.name, Entry(contestant.title))
            if contestant.name in again:
                entry.runs.clear()
            if contestant.name in KFC_VARIANTS:
                entry.lr = contestant.grid[0]
            elif entry.lr is None:
                search(task, with_searched_rates(task, contestant), entry)
                print(f"{task.name}, {contestant.title}: lr {entry.lr:g}, average {entry.average}", flush=True)
            record.save(record_file(folder, task))
        for seed in seeds:
            missing = [c for c in contestants if str(seed) not in record.entries[c.name].runs]
            if missing:
                compete(task, missing, record, seed)
                record.save(record_file(folder, task))
                print(f"{task.name}, seed {seed}: {', '.join(c.name for c in missing)}", flush=True)


def write_tables(folder: Path, group: str, seeds: Sequence[int]) -> str:
    """Write the table of a group of tasks, and those on which a peer is ahead of KFC at its defaults.

    Returns:
        The text.
    """
    records = [load_record(folder, task) for task in GROUPS[group].values()]
    names = tuple(AWAY_CONTESTANTS)
    lines = [table(records, names, seeds), "", *ahead(records, names, seeds), ""]
    behind = missed(records, names, seeds)
    lines += ["Where a peer is ahead of KFC at its defaults, not averaged:", "", *behind] if behind else []
    text = "\n".join(lines)
    name = "contest_averaged.md" if group == "home" else f"away_{group.replace('-', '_')}.md"
    (folder / name).write_text(text.rstrip() + "\n")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=GROUPS, default="choosing")
    parser.add_argument("--only", nargs="+", choices=[*AWAY, *HOME], help="of these, the named tasks alone")
    parser.add_argument("--contestants", nargs="+", choices=AWAY_CONTESTANTS, default=list(AWAY_CONTESTANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--again", nargs="+", choices=AWAY_CONTESTANTS, default=())
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    tasks = [task for name, task in GROUPS[options.tasks].items() if options.only is None or name in options.only]
    contestants = [AWAY_CONTESTANTS[name] for name in options.contestants]
    run_missing(tasks, contestants, options.seeds, options.results, options.again)
    print(write_tables(options.results, options.tasks, options.seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
