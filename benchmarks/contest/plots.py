"""Plots of measurements; ``python -m benchmarks.contest.plots`` draws them again from the saved results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.contest.curves import Curve
from benchmarks.contest.report import Results
from benchmarks.paths import PLOTS, RESULTS

#: Colours for colour-blind readers (Okabe & Ito), by contestant; other contestants follow in this order.
COLOURS = {
    "sgd": "#0072B2",
    "adam": "#E69F00",
    "muon": "#009E73",
    "soap": "#CC79A7",
    "shampoo": "#56B4E9",
    "kron": "#999999",
    "kfc": "#D55E00",
}
OTHER_COLOURS = ("#000000", "#7F3C8D", "#5D4037", "#A5AA99", "#F0E442")

#: Text stays text and ids are the same in every run, for small files and small diffs.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-kfc",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


#: The contest in the picture of the documentation's first page.
FIRST_PAGE = ("conv", 512)
SHOWN_FIRST = ("sgd", "adam", "muon", "soap", "kfc")


def median_curve(curves: Sequence[Curve]) -> Curve:
    """The medians over seeds, at common iterations."""
    shared = set.intersection(*(set(curve.iterations) for curve in curves))
    result = Curve()
    for iteration in sorted(shared):
        places = [curve.iterations.index(iteration) for curve in curves]
        result.append(
            iteration,
            median(curve.seconds[i] for curve, i in zip(curves, places, strict=True)),
            median(curve.losses[i] for curve, i in zip(curves, places, strict=True)),
        )
    return result


def plot_convergence(results: Results, path: Path) -> None:
    """Training loss against iterations and against CPU seconds: each seed faint, the median bold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    others = iter(OTHER_COLOURS)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.4), sharey=True, layout="constrained")
        for name in results.curves:
            curves = results.of(name)
            colour = COLOURS.get(name) or next(others)
            tuned = " (tuned)" if results.tuned.get(name) else ""
            middle = median_curve(curves)
            for axis, unit in zip(axes, ("iterations", "seconds"), strict=True):
                for curve in curves:
                    axis.plot(getattr(curve, unit), curve.losses, color=colour, alpha=0.2, linewidth=0.8)
                axis.plot(getattr(middle, unit), middle.losses, color=colour, label=results.titles[name] + tuned)
        axes[0].set(yscale="log", ylabel="training loss", xlabel=f"iterations (batch {results.batch_size})")
        axes[1].set(xlabel="CPU seconds (one thread)")
        axes[0].set_ylim(top=_sensible_top(results))
        for target in results.targets:
            for axis in axes:
                axis.axhline(target, color="black", alpha=0.3, linewidth=0.8, linestyle=":")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
        figure.suptitle(f"{results.title}: {len(results.seeds())} seeds and their median")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def plot_first_page(results: Results, path: Path) -> None:
    """Medians of a few contestants, in letters that are legible on a phone."""
    with mpl.rc_context({**STYLE, "font.size": 12}):
        figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.8), sharey=True, layout="constrained")
        for name in (name for name in SHOWN_FIRST if name in results.curves):
            middle = median_curve(results.of(name))
            for axis, unit in zip(axes, ("iterations", "seconds"), strict=True):
                label = "KFC" if name == "kfc" else results.titles[name].split(",")[0]
                axis.plot(getattr(middle, unit), middle.losses, color=COLOURS[name], linewidth=2, label=label)
        axes[0].set(yscale="log", ylabel="training loss", xlabel="iterations")
        axes[1].set(xlabel="CPU seconds")
        axes[0].set_ylim(top=_sensible_top(results))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=1.2)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def plot_all(contests: Sequence[Results], plots: Path) -> None:
    """Plot every contest, and the picture of the first page."""
    for results in contests:
        plot_convergence(results, plots / f"contest_{results.task}_b{results.batch_size}.svg")
        if (results.task, results.batch_size) == FIRST_PAGE:
            plot_first_page(results, plots / "first_page.svg")


def _sensible_top(results: Results) -> float:
    """Slightly above the highest start, so that a diverging run does not flatten the others."""
    starts = [curve.losses[0] for name in results.curves for curve in results.of(name)]
    return 2 * max(start for start in starts if math.isfinite(start))


if __name__ == "__main__":
    plot_all([Results.load(source) for source in sorted(RESULTS.glob("contest_*.json"))], PLOTS)
