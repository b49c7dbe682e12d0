"""Predict the cost of KFC on 1 to 4,096 ranks.

``python -m benchmarks.scale.scaling`` prints and plots the predicted overhead of a step, and the memory of a rank, for
each placement, by :mod:`benchmarks.scale.model`; ``python -m benchmarks.scale.scaling_check`` compares the model with
runs on this machine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.cost.shapes import NETWORKS, Network
from benchmarks.paths import PLOTS, RESULTS
from benchmarks.scale.model import Machine, Schedule, gpu_nodes, predict
from benchmarks.scale.scaling_plot import plot

PLACEMENTS: dict[str, str | float] = {"comm-opt": "comm-opt", "1/8 of the ranks": 0.125, "mem-opt": "mem-opt"}


def table(network: Network, machine: Machine, sizes: Sequence[int], schedule: Schedule) -> str:
    """Overhead and memory by placement, for numbers of ranks."""
    heads = " | ".join(f"{name}: overhead | GB a rank" for name in PLACEMENTS)
    lines = [
        f"{network.title}; {machine.title}; statistics every {schedule.factor_every} steps, inverses every "
        f"{schedule.inverse_every}.",
        "",
        f"| ranks | {heads} |",
        "|---" + "|---" * (2 * len(PLACEMENTS)) + "|",
    ]
    for ranks in sizes:
        cells = [f"{ranks:,}"]
        for placement in PLACEMENTS.values():
            cost = predict(network, machine, ranks, placement)
            cells += [f"{100 * cost.overhead(schedule):.1f}%", f"{cost.memory / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, plot, and keep the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in zip(gpu_nodes.__code__.co_varnames, gpu_nodes.__defaults__ or (), strict=False):
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--largest", type=int, default=4096, help="ranks, a power of two")
    parser.add_argument("--factor-every", type=int, default=Schedule.factor_every)
    parser.add_argument("--inverse-every", type=int, default=Schedule.inverse_every)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=PLOTS)
    options = vars(parser.parse_args(arguments))
    schedule = Schedule(options.pop("factor_every"), options.pop("inverse_every"))
    results, figures, largest = (options.pop(name) for name in ("results", "figures", "largest"))
    machine = gpu_nodes(**options)
    sizes = [2**power for power in range(int(math.log2(largest)) + 1)]
    costs = {
        key: {
            name: {ranks: predict(network, machine, ranks, placement) for ranks in sizes}
            for name, placement in PLACEMENTS.items()
        }
        for key, network in NETWORKS.items()
    }
    shown = [ranks for ranks in sizes if ranks in (1, 8, 64, 512, largest)]
    text = "\n".join(table(network, machine, shown, schedule) for network in NETWORKS.values())
    print(text)
    results.mkdir(parents=True, exist_ok=True)
    (results / "scaling.md").write_text(text)
    kept = {
        key: {name: {ranks: asdict(cost) for ranks, cost in by.items()} for name, by in own.items()}
        for key, own in costs.items()
    }
    (results / "scaling.json").write_text(json.dumps({"machine": options, "costs": kept}, indent=1) + "\n")
    plot(costs, schedule, figures / "scaling.svg")


if __name__ == "__main__":
    main()
