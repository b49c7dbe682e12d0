"""The goals for the lead away from home, from the records of all contests: ``python -m benchmarks.away.goals``.

KFC has its defaults, an average of its weights with decay 0.9 among them; each peer has the learning rate and the
average that a search chose. A second row has the one of KFC's averages (none, 0.8, 0.9) with the fewest iterations on
each task. Ratios are KFC's number divided by the other's, of medians over seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.away.averages import AVERAGES, NONE
from benchmarks.away.contest import GROUPS, HOME, SEEDS, record_file
from benchmarks.away.contestants import KFC_VARIANTS
from benchmarks.away.records import Record
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.cost.later_steps import NETWORKS
from benchmarks.paths import RESULTS
from benchmarks.recipes.runs import AVERAGED, KFC_NAME
from benchmarks.recipes.runs import AVERAGES as RECIPE_AVERAGES
from benchmarks.recipes.tables import GOAL as LARGEST_SHARE
from benchmarks.recipes.tables import best_peer, reach

#: The largest ratios of iterations, and of seconds: on most tasks, and on any.
ITERATIONS, SECONDS, WORST_SECONDS = 0.7, 1.0, 1.25
#: The share of the tasks on which the time is to be the least.
MOST = 0.8
#: The callback's average of weights.
DEFAULT = (AVERAGED,)
#: Tasks on which one peer is named: its name, and how many times more iterations and seconds it is to need.
NAMED = {"conv_b512": ("sgd", 10.0, 5.0), "autoencoder_b512": ("adam", 12.0, 4.0)}
#: The largest costs of a later step in SGD's, and of a loss in evaluation mode relative to that with new statistics.
LATER = {"resnet": 1.15, "conv": 1.15, "vit": 1.15, "autoencoder": 2.5}
EVALUATION = 1.1
#: What the titles of rows with KFC's best average say.
BEST = ", KFC with its best average"
TITLES = {"home": "home", "choosing": "away, choosing", "held-back": "away, held back"}


@dataclass(frozen=True)
class Pair:
    """KFC beside the best peer on one task: the least iterations, and the least seconds, of all peers.

    Attributes:
        title: The task, in tables.
        own: KFC's iterations and seconds.
        average: The average of KFC's weights.
        iterations: The best peer's iterations, and its title.
        seconds: The best peer's seconds, and its title.
    """

    title: str
    own: tuple[float, float]
    average: str
    iterations: tuple[float, str]
    seconds: tuple[float, str]

    @property
    def ratios(self) -> tuple[float, float]:
        """KFC's iterations and seconds, as shares of the best peer's."""
        return self.own[0] / self.iterations[0], self.own[1] / self.seconds[0]


def own_medians(record: Record, averages: Sequence[str]) -> tuple[tuple[float, float], str]:
    """KFC's fewest iterations with one of these averages, the seconds, and the average; infinite if never there."""
    found = []
    for average in averages:
        medians = record.entries[KFC_NAME].medians(average, SEEDS)
        assert medians is not None, f"{record.task} has no runs of KFC"
        found.append((medians, average))
    return min(found)


def pair(group: str, record: Record, averages: Sequence[str] = DEFAULT) -> Pair:
    """KFC with the best of these averages, beside the best peer of a record."""
    peers = {}
    for name, entry in record.entries.items():
        medians = None if entry.average is None else entry.medians(entry.average, SEEDS)
        if name not in KFC_VARIANTS and medians is not None:
            peers[entry.title] = medians
    least = [min((values[unit], title) for title, values in peers.items()) for unit in (0, 1)]
    title = f"{TITLES[group]}: {record.task.replace('_', ' ')}, {record.batch_size}"
    return Pair(title, *own_medians(record, averages), *least)


def tasks_table(defaults: Sequence[Pair], best: Sequence[Pair]) -> str:
    """A row a task: iterations and seconds of KFC, with its default and with its best average, and of the best peer."""
    lines = [
        "| task, batch | KFC: iterations / seconds | with its best average | fewest iterations of a peer | ratios "
        "| least seconds of a peer | ratios |",
        "|---|---|---|---|---|---|---|",
    ]
    for each, other in zip(defaults, best, strict=True):
        ratios = [
            f"{_marked(each.ratios[unit], limit)}, {_marked(other.ratios[unit], limit)}"
            for unit, limit in enumerate((ITERATIONS, SECONDS))
        ]
        cells = [
            each.title,
            f"{each.own[0]:.0f} / {each.own[1]:.2f}",
            f"{other.own[0]:.0f} / {other.own[1]:.2f} ({other.average})",
            f"{each.iterations[0]:.0f}, {each.iterations[1]}",
            ratios[0],
            f"{each.seconds[0]:.2f}, {each.seconds[1]}",
            ratios[1],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _marked(ratio: float, limit: float) -> str:
    """A ratio, bold if it misses its limit."""
    return f"{ratio:.2f}" if ratio <= limit else f"**{ratio:.2f}**"


def _row(goal: str, limit: str, measured: str, met: bool) -> str:
    return f"| {goal} | {limit} | {measured} | {'met' if met else '**missed**'} |"


def rows_of_tasks(pairs: Sequence[Pair], which: str) -> Iterable[str]:
    """The goals for every task; ``which`` names the averages in the title."""
    for unit, limit in enumerate((ITERATIONS, SECONDS)):
        ratios = [each.ratios[unit] for each in pairs]
        good, worst = sum(ratio <= limit for ratio in ratios), max(ratios)
        measured = f"{good} of {len(pairs)}, worst {worst:.2f} ({pairs[ratios.index(worst)].title})"
        if unit == 0:
            goal = f"≤ {limit:g} of the best peer's"
            yield _row(f"iterations, each task{which}", goal, measured, good == len(pairs))
        else:
            goal = f"≤ the best peer's on {100 * MOST:g} %, never above {WORST_SECONDS:g} of them"
            met = good >= MOST * len(pairs) and worst <= WORST_SECONDS
            yield _row(f"time, each task{which}", goal, measured, met)


def rows_of_named(records: Mapping[str, Record], averages: Sequence[str], which: str) -> Iterable[str]:
    """The goals that name a task and a peer; ``which`` names the averages in the title."""
    for label, (name, *limits) in NAMED.items():
        title = f"{HOME[label].title}, batch {HOME[label].batch_size}, against {name}"
        record = records.get(label)
        theirs = None if record is None else record.entries[name].medians(record.entries[name].average or NONE, SEEDS)
        ours = None if record is None else own_medians(record, averages)[0]
        for position, (unit, limit) in enumerate(zip(("iterations", "seconds"), limits, strict=True)):
            times = math.nan if theirs is None or ours is None else theirs[position] / ours[position]
            measured = "not measured" if math.isnan(times) else f"{times:.1f} times"
            yield _row(f"{title}: {unit}{which}", f"{limit:g} times fewer", measured, times >= limit)


def rows_of_recipes(recipes: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The goal for whole recipes."""
    shares = {record["recipe"]: reach(dict(record), KFC_NAME, best_peer(dict(record))).share for record in recipes}
    listed = ", ".join(
        f"{name.replace('_', ' ')} {share:.2f}" if math.isfinite(share) else f"{name.replace('_', ' ')} never"
        for name, share in shares.items()
    )
    good = sum(share <= LARGEST_SHARE for share in shares.values())
    limit = f"≤ {LARGEST_SHARE:g} of its time"
    measured = f"{good} of {len(shares)}: {listed}"
    yield _row("recipes: to the best peer's final validation value", limit, measured, good == len(shares))


def rows_of_costs(later: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    """The goals for later steps."""
    for name, limit in LATER.items():
        cost = later[TASKS[name].title]["cost"]
        title = f"a later step of {TASKS[name].title.split(',')[0]}, batch {NETWORKS[name]}"
        yield _row(title, f"≤ {limit:g} of SGD's", f"{cost:.2f}", cost <= limit)


def row_of_evaluation(networks: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The goal for networks with batch norm."""
    worst = max(
        losses["averaged"] / losses["averaged, fresh"]
        for runs in networks.values()
        for steps in runs.values()
        for losses in steps.values()
    )
    title = "training loss in evaluation mode, relative to that with new statistics of batch norm"
    return _row(title, f"≤ {EVALUATION:g}", f"at most {worst:.2f} ({len(networks)} networks)", worst <= EVALUATION)


def row_of_divergences(records: Iterable[Record], recipes: Iterable[Mapping[str, Any]]) -> str:
    """The goal that no run of KFC ends without a finite loss."""
    ends = [
        outcomes[average].loss
        for record in records
        for outcomes in record.entries[KFC_NAME].runs.values()
        for average in AVERAGES
    ]
    ends += [
        run[average]["losses"][-1]
        for record in recipes
        for results in record["runs"].values()
        for run in results[KFC_NAME].values()
        for average in RECIPE_AVERAGES
    ]
    bad = sum(loss is None for loss in ends)
    return _row("divergences, all tasks and seeds", "0", f"{bad} of {len(ends)} loss curves", bad == 0)


def measured_records(folder: Path, tasks: Mapping[str, Task]) -> dict[str, Record]:
    """The records of tasks whose contestants have run on all seeds."""
    found = {name: Record.load(path) for name, task in tasks.items() if (path := record_file(folder, task)).exists()}
    seeds = {str(seed) for seed in SEEDS}
    return {
        name: record for name, record in found.items() if all(seeds <= set(e.runs) for e in record.entries.values())
    }


def report(folder: Path = RESULTS) -> str:
    """The table of goals, and that of the tasks, from the records of a folder."""
    groups = {group: measured_records(folder, tasks) for group, tasks in GROUPS.items()}
    defaults, best = (
        [pair(group, record, averages) for group, records in groups.items() for record in records.values()]
        for averages in (DEFAULT, AVERAGES)
    )
    recipes = [json.loads(path.read_text()) for path in sorted(folder.glob("recipes_contest_*.json"))]
    recipes = [record for record in recipes if "runs" in record]
    numbers = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("later_steps", "evaluation_mode")}
    lines = [
        "| goal | limit | measured | |",
        "|---|---|---|---|",
        *rows_of_tasks(defaults, ""),
        *rows_of_tasks(best, BEST),
        *rows_of_named(groups["home"], DEFAULT, ""),
        *rows_of_named(groups["home"], AVERAGES, BEST),
        *rows_of_recipes(recipes),
        *rows_of_costs(numbers["later_steps"]),
        _row("loss times 1e-6 to 1e6", "the same training", "`tests/engine/test_units.py`, to 1e-6", True),
        row_of_evaluation(numbers["evaluation_mode"]),
        row_of_divergences((r for records in groups.values() for r in records.values()), recipes),
    ]
    return "\n".join(lines) + "\n\nTask by task; bold: missed.\n\n" + tasks_table(defaults, best)


def main() -> None:
    """Write and print the tables."""
    text = report()
    (RESULTS / "away_goals.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
