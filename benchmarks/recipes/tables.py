"""Results of the contest of whole recipes: values at the end, and the time to the best peer's value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.recipes.runs import AVERAGED, AVERAGES, KFC_NAME, PLAIN, TRAINEES

LENGTHS = (0.25, 0.5, 1.0)
#: The goal for KFC's time to the best peer's value, as a share of the peer's time.
GOAL = 0.6
#: The curves of a run.
VALUES, LOSSES = "values", "losses"
CURVES = {VALUES: "validation value", LOSSES: "validation loss"}


@dataclass(frozen=True)
class End:
    """The end of an optimizer's runs at one length, medians over seeds.

    Attributes:
        name: The name of the optimizer.
        length: The length of the schedule.
        average: The validated average: that with the lower value, and KFC's default.
        value: The validation value; infinite after divergence.
        seconds: CPU seconds of the steps.
        epochs: The epochs of the run.
    """

    name: str
    length: float
    average: str
    value: float
    seconds: float
    epochs: float


def _runs(record: dict[str, Any], name: str, length: float) -> list[dict[str, Any]]:
    return [results[name][f"{length:g}"] for results in record["runs"].values()]


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def end(record: dict[str, Any], name: str, length: float, curve: str = VALUES) -> End:
    """The end of an optimizer's runs at a length."""
    runs = _runs(record, name, length)

    def value(average: str) -> float:
        return median(_number(run[average][curve][-1]) for run in runs)

    average = AVERAGED if name == KFC_NAME else min(AVERAGES, key=value)
    seconds = median(run[average]["seconds"][-1] for run in runs)
    return End(name, length, average, value(average), seconds, median(run["epochs"][-1] for run in runs))


def best_peer(record: dict[str, Any], curve: str = VALUES) -> End:
    """The peer, length and average with the lowest value at the end; the faster one of equals."""
    ends = [end(record, name, length, curve) for name in TRAINEES if name != KFC_NAME for length in LENGTHS]
    return min(ends, key=lambda each: (each.value, each.seconds))


@dataclass(frozen=True)
class Reach:
    """The first validations of an optimizer at the best peer's values, each seed's its own, medians over seeds.

    Attributes:
        seconds: CPU seconds of the steps; infinite if half of the seeds never were there.
        epochs: The same.
        share: Of the best peer's seconds to its end, seed by seed.
        length: Of the schedule; None for never.
    """

    seconds: float = math.inf
    epochs: float = math.inf
    share: float = math.inf
    length: float | None = None


def reach(record: dict[str, Any], name: str, best: End, curve: str = VALUES) -> Reach:
    """An optimizer's way to the values at the end of the best peer's runs, at the length that is there first."""
    ends = [run[best.average] for run in _runs(record, best.name, best.length)]
    found = [Reach()]
    for length in LENGTHS:
        average = end(record, name, length, curve).average
        seconds, epochs, shares = [], [], []
        for run, best_end in zip(_runs(record, name, length), ends, strict=True):
            target, values = _number(best_end[curve][-1]), [_number(value) for value in run[average][curve]]
            first = next((i for i, value in enumerate(values) if value <= target), None)
            seconds.append(math.inf if first is None else run[average]["seconds"][first])
            epochs.append(math.inf if first is None else run["epochs"][first])
            shares.append(seconds[-1] / best_end["seconds"][-1])
        if math.isfinite(median(seconds)):
            found.append(Reach(median(seconds), median(epochs), median(shares), length))
    return min(found, key=lambda each: each.share)


def goals(records: Sequence[dict[str, Any]], curve: str = VALUES) -> str:
    """A row for each recipe: the best peer's value at the end, and KFC's time to it."""
    lines = [
        f"| recipe | best peer's {CURVES[curve]} | its epochs / seconds | KFC there after | share of the time | goal | "
        "first peer there |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        best = best_peer(record, curve)
        own = reach(record, KFC_NAME, best, curve)
        peers = {name: reach(record, name, best, curve).seconds for name in TRAINEES if name != KFC_NAME}
        first = min(peers, key=peers.__getitem__)
        cells = [
            record["recipe"].replace("_", " ") + (f", {record['metric']}" if curve == VALUES else ""),
            f"{best.value:.4g}, {TRAINEES[best.name].title}, length {best.length:g}",
            f"{best.epochs:.3g} / {best.seconds:.1f}",
            "never" if own.length is None else f"{own.epochs:.3g} / {own.seconds:.1f}, length {own.length:g}",
            "-" if own.length is None else f"{own.share:.2f}",
            "met" if own.share <= GOAL else "missed",
            f"{TRAINEES[first].title}, {peers[first]:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recipe_table(record: dict[str, Any]) -> str:
    """A row for each optimizer: value at the end / seconds by length, and the time to the best peer's value."""
    ends = {(name, length): end(record, name, length) for name in TRAINEES for length in LENGTHS}
    best = min(each.value for each in ends.values())
    peer = best_peer(record)
    heads = " | ".join(f"{length * record['epochs']:g} epochs" for length in LENGTHS)
    lines = [
        f"| {record['metric']} / CPU seconds | rate | {heads} | to {peer.value:.4g}: epochs / seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, trainee in TRAINEES.items():
        cells = []
        for length in LENGTHS:
            own = ends[name, length]
            value = "diverged" if math.isinf(own.value) else f"{own.value:.4g}"
            marked = f"**{value}**" if own.value == best else value
            cells.append(f"{marked} / {own.seconds:.1f}" + ("" if own.average == PLAIN else " (a)"))
        own_way = reach(record, name, peer)
        there = "never" if own_way.length is None else f"{own_way.epochs:.3g} / {own_way.seconds:.1f}"
        lines.append(f"| {trainee.title} | {record['rates'][name]:.3g} | {' | '.join(cells)} | {there} |")
    return "\n".join(lines)


def write_tables(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write the tables of the finished recipes.

    Returns:
        The text.
    """
    measured = [record for record in records if record["runs"]]
    parts = [goals(measured), "The same for the loss on the held-out examples:", goals(measured, LOSSES)]
    for record in measured:
        seeds = len(record["runs"])
        title = f"**{record['title']}**; batch {record['batch_size']}, {seeds} seed{'s' if seeds > 1 else ''}."
        parts += [title, recipe_table(record)]
    text = "\n\n".join(parts)
    (folder / "recipes_contest.md").write_text(text + "\n")
    return text
