"""Goals for the contest's results: ``python -m benchmarks.contest.goals``.

KFC has the callback's defaults on every task, the other contestants their tuned learning rates. A ratio is the median
over seeds of the other contestant's iterations or seconds to the task's hardest loss, divided by those of KFC.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from benchmarks.contest.curves import Curve, median_ratio
from benchmarks.contest.report import Results
from benchmarks.paths import RESULTS

OWN = "kfc"


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        task: The label of a contest, such as ``"conv_b512"``.
        other: The contestant compared with.
        unit: ``"iterations"`` or ``"seconds"``.
        ratio: The least ratio of the other contestant's to KFC's.
    """

    task: str
    other: str
    unit: str
    ratio: float

    def measured(self, results: Results) -> float:
        """The ratio in these results; NaN if neither reached the loss, or without a measurement."""
        if self.other not in results.curves or OWN not in results.curves:
            return math.nan
        target = results.targets[-1]
        ours, theirs = ([getattr(c.reach(target), self.unit) for c in results.of(name)] for name in (OWN, self.other))
        return median_ratio(ours, theirs)


def goals(labels: list[str]) -> Iterator[Goal]:
    """All goals: those for single tasks, and those for every task.

    Args:
        labels: The measured tasks.
    """
    yield Goal("conv_b512", "sgd", "iterations", 10.0)
    yield Goal("conv_b512", "sgd", "seconds", 5.0)
    yield Goal("conv_b512", "soap", "seconds", 1.25)
    yield Goal("autoencoder_b512", "adam", "iterations", 10.0)
    yield Goal("autoencoder_b512", "muon", "seconds", 1.0)
    for task in ("conv_b128", "autoencoder_b128"):
        for other in ("sgd", "adam"):
            yield Goal(task, other, "seconds", 2.0)
    for label in labels:
        yield Goal(label, "adam", "seconds", 1.0)
        if not label.startswith("autoencoder"):
            yield Goal(label, "soap", "seconds", 1.0)
            yield Goal(label, "muon", "seconds", 1.0)


def diverged(results: Results) -> int:
    """The number of KFC's runs that ended above their first loss, or without a finite loss."""
    return sum(not curve.losses[-1] < curve.losses[0] for curve in results.of(OWN))


def table(contests: Mapping[str, Results]) -> str:
    """Every goal with its measurement.

    Args:
        contests: The results, by label.
    """
    lines = ["| task | other | of what | goal: times more than KFC | measured | met |", "|---|---|---|---|---|---|"]
    met = []
    for goal in goals(list(contests)):
        if goal.task not in contests:
            continue
        results = contests[goal.task]
        ratio = goal.measured(results)
        met.append(ratio >= goal.ratio)
        task, other = f"{results.title}, batch {results.batch_size}", results.titles.get(goal.other, goal.other)
        lines.append(f"| {task} | {other} | {goal.unit} | {goal.ratio:g} | {_shown(ratio)} | {_word(met[-1])} |")
    runs, bad = sum(len(r.of(OWN)) for r in contests.values()), sum(map(diverged, contests.values()))
    return "\n".join([*lines, "", f"{sum(met)} of {len(met)} are met. Of KFC's {runs} runs, {bad} diverged."])


def cost_table(contests: Mapping[str, Results], plain: str = "sgd", start: int = 10) -> str:
    """The costs of KFC's steps in each contest, in steps of plain SGD: in the warm-up, and later.

    Args:
        contests: The results, by label.
        plain: The contestant whose steps are the unit.
        start: The length of the warm-up.
    """
    lines = [
        f"| task | first {start} steps, each | later steps, each | the first {start}'s share of the time to the loss |",
        "|---|---|---|---|",
    ]
    for results in contests.values():
        if plain not in results.curves:
            continue
        pairs = list(zip(results.of(OWN), results.of(plain), strict=True))
        units = [sgd.seconds[-1] / sgd.iterations[-1] for _, sgd in pairs]
        early = [_seconds_at(own, start) for own, _ in pairs]
        first = median(seconds / start / unit for seconds, unit in zip(early, units, strict=True))
        later = median(
            (own.seconds[-1] - seconds) / (own.iterations[-1] - start) / unit
            for (own, _), seconds, unit in zip(pairs, early, units, strict=True)
        )
        share = median(s / own.reach(results.targets[-1]).seconds for (own, _), s in zip(pairs, early, strict=True))
        title = f"{results.title}, batch {results.batch_size}"
        lines.append(f"| {title} | {first:.1f} | {later:.2f} | {100 * share:.0f} % |")
    return "\n".join(lines)


def _seconds_at(curve: Curve, iteration: int) -> float:
    return curve.seconds[curve.iterations.index(iteration)]


def _shown(ratio: float) -> str:
    if math.isnan(ratio):
        return "-"
    return "the other never got there" if math.isinf(ratio) else f"{ratio:.2f}"


def _word(met: bool) -> str:
    return "yes" if met else "**no**"


def main() -> int:
    """Write and print the table."""
    contests = {
        path.stem.removeprefix("contest_"): Results.load(path) for path in sorted(RESULTS.glob("contest_*.json"))
    }
    complete = {label: results for label, results in contests.items() if results.seeds()}
    text = table(complete)
    (RESULTS / "goals.md").write_text(text + "\n")
    costs = cost_table(complete)
    (RESULTS / "contest_cost.md").write_text(costs + "\n")
    print(f"{text}\n\n{costs}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
