"""Results of the convergence benchmark: a file, and markdown tables."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.contest.curves import Curve, HeldOut, median_ratio


@dataclass
class Results:
    """The measurements of one task's contest.

    Attributes:
        task: The task's name.
        title: Its description.
        batch_size: Examples in a batch.
        budget: The largest number of iterations of a run.
        seconds: The largest number of CPU seconds of a run.
        targets: Training losses whose time is reported.
        titles: The contestants' titles, by name.
        lrs: Their learning rates.
        tuned: The choice of each learning rate, for the table's footnotes; empty without tuning.
        curves: The curves, by contestant and seed.
    """

    task: str
    title: str
    batch_size: int
    budget: int
    seconds: float
    targets: Sequence[float]
    titles: dict[str, str] = field(default_factory=dict)
    lrs: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)
    curves: dict[str, dict[int, Curve]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write JSON with the measured versions."""
        entries: dict[str, Any] = dict(vars(self))
        entries["curves"] = {
            name: {str(seed): curve.as_dict() for seed, curve in curves.items()} for name, curves in self.curves.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lists_on_one_line(json.dumps({**entries, "measured_with": measured_with()}, indent=1)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Load a file of :meth:`save`."""
        entries = json.loads(path.read_text())
        del entries["measured_with"]
        entries["curves"] = {
            name: {int(seed): Curve.from_dict(curve) for seed, curve in curves.items()}
            for name, curves in entries["curves"].items()
        }
        return cls(**entries)

    def seeds(self) -> list[int]:
        """The seeds of all contestants."""
        return sorted(set.intersection(*(set(curves) for curves in self.curves.values()))) if self.curves else []

    def of(self, name: str) -> list[Curve]:
        """A contestant's curves, in the order of :meth:`seeds`."""
        return [self.curves[name][seed] for seed in self.seeds()]


def measured_with() -> dict[str, Any]:
    """Versions and number of threads."""
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}


def lists_on_one_line(text: str) -> str:
    """Indented JSON with each list of plain values on one line."""
    lines: list[str] = []
    depth = 0
    for line in text.splitlines():
        stripped = line.strip()
        if depth:
            lines[-1] += stripped + (" " if stripped.endswith(",") else "")
        else:
            lines.append(line)
        if stripped.endswith("[") and not depth:
            depth = 1
        elif depth and (stripped.rstrip(",") == "]" or stripped.endswith(("{", "["))):
            # A list of objects stays unchanged.
            depth = 0
    return "\n".join(line.rstrip() for line in lines)


def markdown(results: Results, reference: str = "kfc") -> str:
    """Medians over seeds with their range, and medians of ratios to the reference contestant.

    Args:
        results: The results.
        reference: The contestant in the denominator of ratios.
    """
    lines = [
        f"{results.title}, batch {results.batch_size}; {len(results.seeds())} seeds: median (lowest to highest); "
        f"at most {results.budget} iterations and {results.seconds:g} CPU seconds a run. "
        "Held out: when the training loss was first met.",
        "",
        "| training loss | optimizer | lr | iterations | ratio | CPU seconds | ratio | held-out loss | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target in results.targets:
        reached = {name: [curve.reach(target) for curve in results.of(name)] for name in results.curves}
        for name, own in reached.items():
            cells = [f"{target:g}", results.titles[name], f"{results.lrs[name]:g}"]
            for unit, digits in (("iterations", 0), ("seconds", 1)):
                values = [getattr(reach, unit) for reach in own]
                cells.append(_spread(values, digits))
                if name == reference or reference not in reached:
                    cells.append("1")
                else:
                    cells.append(_ratio([getattr(reach, unit) for reach in reached[reference]], values))
            cells += _held_out(curve.held_out_at(target) for curve in results.of(name))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_ends(results), "", *_unreached(results), *_choices(results)])


def _ends(results: Results) -> Iterable[str]:
    yield "At the end of the run:"
    yield ""
    yield "| optimizer | iterations | CPU seconds | training loss | held-out loss | accuracy |"
    yield "|---|---|---|---|---|---|"
    for name in results.curves:
        curves = results.of(name)
        cells = [results.titles[name]]
        cells.append(_number(median(curve.iterations[-1] for curve in curves), 0))
        cells.append(_number(median(curve.seconds[-1] for curve in curves), 1))
        cells.append(f"{median(_finite(curve.losses[-1]) for curve in curves):.4g}")
        cells += _held_out(curve.held_out[-1] if curve.held_out else None for curve in curves)
        yield "| " + " | ".join(cells) + " |"


def _held_out(points: Iterable[HeldOut | None]) -> list[str]:
    measured = list(points)
    if any(point is None for point in measured):
        return ["-", "-"]
    losses = [_finite(point.loss) for point in measured if point is not None]
    accuracies = [point.accuracy for point in measured if point is not None and point.accuracy is not None]
    return [f"{median(losses):.4g}", f"{100 * median(accuracies):.1f} %" if accuracies else "-"]


def _unreached(results: Results) -> Iterable[str]:
    """Runs that missed the easiest target, or ended above their first loss, which a median hides."""
    for name in results.curves:
        curves = results.of(name)
        missed = sum(math.isinf(curve.reach(results.targets[0]).iterations) for curve in curves)
        worse = sum(not curve.losses[-1] < curve.losses[0] for curve in curves)
        if missed or worse:
            yield (
                f"**{results.titles[name]}: {missed} of {len(curves)} runs never reached "
                f"{results.targets[0]:g}, {worse} ended above their first loss.**"
            )
            yield ""


def _choices(results: Results) -> Iterable[str]:
    for name in results.curves:
        how = results.tuned.get(name, "")
        yield f"- {results.titles[name]}: {how}" if how else f"- {results.titles[name]}: not tuned."


def overview(all_results: Sequence[Results], names: Sequence[str]) -> str:
    """Iterations and CPU seconds to the hardest target, one row per contestant, KFC first; the least time is bold."""
    columns = [{name: _time_to_hardest(results, name) for name in results.curves} for results in all_results]
    ordered = sorted(names, key=lambda name: not name.startswith("kfc"))
    titles = {name: results.titles[name] for name in ordered for results in all_results if name in results.titles}
    heads = [f"{results.title.split(',')[0]}, {results.batch_size}, {results.targets[-1]:g}" for results in all_results]
    return (
        "Iterations / CPU seconds, medians; bold: the least time; -: never met.\n\n"
        f"{times_table('task, batch, training loss', heads, titles, columns)}"
    )


def _time_to_hardest(results: Results, name: str) -> tuple[float, float]:
    reached = [curve.reach(results.targets[-1]) for curve in results.of(name)]
    return median(reach.iterations for reach in reached), median(reach.seconds for reach in reached)


def times_table(
    corner: str,
    heads: Sequence[str],
    titles: Mapping[str, str],
    columns: Sequence[Mapping[str, tuple[float, float] | None]],
) -> str:
    """Iterations / CPU seconds to a loss, one row per contestant and one column per task.

    Args:
        corner: The title of the heads.
        heads: The tasks.
        titles: The titles of the rows, by contestant.
        columns: For each task, iterations and seconds by contestant, infinite if never; missing if not measured.
    """
    lines = [f"| {corner} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, title in titles.items():
        cells = []
        for column in columns:
            least = min((value[1] for value in column.values() if value is not None), default=math.inf)
            cells.append(time_cell(column.get(name), least))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_cell(value: tuple[float, float] | None, least: float, never: str = "-") -> str:
    """Iterations / CPU seconds, bold for the least time; empty if not measured."""
    if value is None:
        return ""
    if math.isinf(value[0]):
        return never
    text = iterations_and_seconds(*value)
    return f"**{text}**" if value[1] == least else text


def iterations_and_seconds(iterations: float, seconds: float) -> str:
    """Both in one cell; seconds below 1 have two digits."""
    return f"{iterations:.0f}\u00a0/\u00a0{seconds:.{1 if seconds >= 1 else 2}f}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _number(value: float, digits: int) -> str:
    return "-" if math.isinf(value) else f"{value:.{digits}f}"


def _spread(values: Sequence[float], digits: int) -> str:
    middle, lowest, highest = (_number(value, digits) for value in (median(values), min(values), max(values)))
    return middle if middle == lowest == highest else f"{middle} ({lowest} to {highest})"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    ratio = median_ratio(ours, theirs)
    if math.isnan(ratio):
        return "-"
    return "never" if math.isinf(ratio) else f"{ratio:.1f}"
