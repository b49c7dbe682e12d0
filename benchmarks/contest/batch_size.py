"""Iterations to a training loss against the batch size: ``python -m benchmarks.contest.batch_size``.

The paper's argument for many machines is that a method whose iterations decrease with the batch size gains from every
machine that computes a part of the gradient. Here the iterations are measured on one machine: the conv net on
MNIST-5000, with batches of 64 to all 4,096 examples. For each batch size the peers' learning rate is tuned, on a seed
that is not reported, around that of the size before, by the rules of ``tuning.py``; KFC runs at its defaults. A size of
an optimizer is a piece; after an interruption, the command continues with the missing pieces.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib import pyplot as plt

from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.harness import Run, interleave
from benchmarks.contest.optimizers import Contestant
from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.plots import COLOURS, STYLE
from benchmarks.contest.report import lists_on_one_line, measured_with
from benchmarks.contest.tasks import TASKS, Goal, Task
from benchmarks.contest.tuning import Tuning, tune

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NAMES = ("sgd", "muon", "kfc")
SEEDS = (0, 1, 2)
TUNING_SEED = 100
TARGET = 0.1
BUDGET = 600
#: The least gain of a doubling of the batch, as a share of the iterations; a perfect doubling saves half.
GAIN = 0.2

#: By contestant and batch size: the learning rate, and the iterations of each seed (None: not reached).
Found = dict[str, dict[int, dict[str, Any]]]


def sized(task: Task, size: int, budget: int = BUDGET, target: float = TARGET) -> Task:
    """A task at any batch size, without a limit of seconds."""
    return replace(task, batch_size=size, goals={size: Goal((target,), budget, math.inf)})


def measure(task: Task, contestant: Contestant, around: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Search a learning rate around one, and count the iterations to the target with it.

    Args:
        task: The task at the batch size.
        contestant: The contestant.
        around: The middle of the initial grid of three.
        seeds: The seeds whose iterations are counted.
    """
    lr = contestant.grid[0]
    if contestant.tuned:
        tuning = Tuning.of(task)
        tune(task, replace(contestant, grid=(around / 2, around, 2 * around)), [TUNING_SEED], tuning)
        lr = tuning.choice(contestant.name)
    runs = [Run(task, contestant, lr, seed) for seed in seeds]
    target = task.targets[-1]
    interleave(runs, until=lambda run: run.curve.losses[-1] <= target, block=1)
    reached = [run.curve.reach(target).iterations for run in runs]
    return {"lr": lr, "iterations": [round(r, 1) if math.isfinite(r) else None for r in reached]}


def measure_missing(
    task: Task, sizes: Sequence[int], seeds: Sequence[int], found: Found, save: Path, pieces: int | None = None
) -> bool:
    """Measure the missing pieces, saving after each batch size of each contestant.

    Returns:
        Whether all pieces are measured.
    """
    missing = [(name, size) for name in NAMES for size in sizes if size not in found.get(name, {})]
    for name, size in missing[:pieces]:
        contestant = CONTESTANTS[name]
        own = found.setdefault(name, {})
        smaller = [own[known]["lr"] for known in sorted(own) if known < size]
        around = smaller[-1] if smaller else contestant.grid[len(contestant.grid) // 2]
        own[size] = measure(replace(task, batch_size=size, goals={size: task.goal}), contestant, around, seeds)
        store(found, save)
        print(f"{contestant.title}, batch {size}: {own[size]}", flush=True)
    return pieces is None or len(missing) <= pieces


def store(found: Found, path: Path) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"target": TARGET, "found": found, "measured_with": measured_with()}
    path.write_text(lists_on_one_line(json.dumps(entries, indent=1)) + "\n")


def load(path: Path) -> Found:
    """Load a file of :func:`store`; empty without a file."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())["found"]
    return {name: {int(size): entry for size, entry in sizes.items()} for name, sizes in entries.items()}


def medians(sizes: dict[int, dict[str, Any]]) -> dict[int, float]:
    """The median iterations at each batch size; infinite if most runs missed the target."""
    return {
        size: median(math.inf if count is None else count for count in entry["iterations"])
        for size, entry in sorted(sizes.items())
    }


def stops_gaining(iterations: dict[int, float]) -> int | None:
    """The first batch size whose doubling saves less than ``GAIN`` of the iterations; None if there is none."""
    for smaller, larger in itertools.pairwise(sorted(iterations)):
        if math.isfinite(iterations[smaller]) and iterations[larger] > (1 - GAIN) * iterations[smaller]:
            return smaller
    return None


def markdown(task: Task, found: Found) -> str:
    """A row per batch size, and the size at which each optimizer stops gaining."""
    titles = [CONTESTANTS[name].title for name in found]
    lines = [
        f"{task.title}: iterations to a training loss of {TARGET:g}, median of {len(SEEDS)} seeds (learning rate).",
        "",
        "| batch | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
    ]
    reached = {name: medians(sizes) for name, sizes in found.items()}
    for size in sorted({size for sizes in found.values() for size in sizes}):
        cells = []
        for name, sizes in found.items():
            count = reached[name].get(size, math.inf)
            cells.append("-" if math.isinf(count) else f"{count:.0f} ({sizes[size]['lr']:g})")
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, iterations in reached.items():
        stop = stops_gaining(iterations)
        where = "at no size measured" if stop is None else f"at {stop}"
        lines.append(f"- {CONTESTANTS[name].title}: doubling the batch saves less than {GAIN:.0%} first {where}.")
    return "\n".join(lines)


def plot(task: Task, found: Found, path: Path) -> None:
    """Iterations against batch size, both logarithmic; dotted: halved by each doubling."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for name, sizes in found.items():
            iterations = medians(sizes)
            axis.plot(
                list(iterations), list(iterations.values()), "o-", color=COLOURS[name], label=CONTESTANTS[name].title
            )
            for size, entry in sizes.items():
                counts = [count for count in entry["iterations"] if count is not None]
                axis.plot([size] * len(counts), counts, ".", color=COLOURS[name], alpha=0.4)
            first = min(iterations)
            ideal = [iterations[first] * first / size for size in iterations]
            axis.plot(list(iterations), ideal, ":", color=COLOURS[name], alpha=0.6)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel=f"iterations to a training loss of {TARGET:g}")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.set_ylim(bottom=1)
        axis.legend(fontsize=8)
        axis.set_title(task.title, fontsize=10)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the missing pieces, and write table and plot.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--again", nargs="+", choices=NAMES, default=(), help="forget what these contestants did before"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = sized(TASKS["conv"], min(options.sizes))
    saved = options.results / "batch_size.json"
    found = {name: sizes for name, sizes in load(saved).items() if name not in options.again}
    done = measure_missing(task, options.sizes, options.seeds, found, saved, options.pieces)
    text = markdown(task, found)
    (options.results / "batch_size.md").write_text(text + "\n")
    plot(task, found, options.plots / "batch_size.svg")
    print(text)
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
