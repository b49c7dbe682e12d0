"""The plot of the scaling model: overhead and memory against ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks.contest.plots import OTHER_COLOURS, STYLE
from benchmarks.cost.shapes import NETWORKS
from benchmarks.scale.model import Cost, Schedule

Costs = Mapping[str, Mapping[str, Mapping[int, Cost]]]


def plot(costs: Costs, schedule: Schedule, path: Path) -> None:
    """One column per network: overhead of an average step above, memory of factors and inverses below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(costs), figsize=(10, 5), sharex=True, layout="constrained", squeeze=False)
        for column, (key, placements) in enumerate(costs.items()):
            for colour, (name, by_ranks) in zip(OTHER_COLOURS, placements.items(), strict=False):
                ranks = list(by_ranks)
                overhead = [100 * cost.overhead(schedule) for cost in by_ranks.values()]
                memory = [cost.memory / 1e9 for cost in by_ranks.values()]
                axes[0][column].plot(ranks, overhead, color=colour, label=name)
                axes[1][column].plot(ranks, memory, color=colour, label=name)
            axes[0][column].set(xscale="log", yscale="log", title=NETWORKS[key].title.split(",")[0].split(" of ")[0])
            axes[1][column].set(xscale="log", yscale="log", xlabel="ranks")
        axes[0][0].set(ylabel="predicted overhead, %")
        axes[1][0].set(ylabel="factors and inverses, GB a rank")
        axes[0][0].legend()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
