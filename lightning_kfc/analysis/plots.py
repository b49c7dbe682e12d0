"""Pictures of a comparison; they need the extra ``pictures``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_kfc.analysis.results import TITLES, Comparison
from lightning_kfc.pictures.canvas import COLOURS, grid, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Eigenvalues are drawn down to this share of the largest exact one.
SMALLEST_SHARE = 1e-8
#: Most points of a spectrum's line.
MOST_POINTS = 60


def draw_block_spectra(comparison: Comparison) -> Figure:
    """The eigenvalues of each layer's exact block and of its approximations, in descending order.

    Args:
        comparison: From :func:`~lightning_kfc.analysis.compare_curvature`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    with style():
        figure, (axes,) = grid(1, max(1, len(comparison.layers)), 3.1, 2.7)
        for axis, (name, layer) in zip(axes, comparison.layers.items(), strict=False):
            floor = SMALLEST_SHARE * float(layer.eigenvalues[:1].sum())
            axis.plot(*_points(layer.eigenvalues, floor), color="black", linewidth=2.2, label="exact")
            for colour, approximation in zip(COLOURS, layer.approximations, strict=False):
                points = _points(approximation.eigenvalues, floor)
                axis.plot(*points, color=colour, linewidth=1.2, label=TITLES[approximation.name])
            axis.set(xscale="log", yscale="log", xlabel="eigenvalue number")
            axis.set_title(f"{name} ({layer.parameters:,} parameters)")
        axes[0].set_ylabel("eigenvalue")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        return figure


def draw_errors(comparison: Comparison) -> Figure:
    """For each layer, the relative error of each approximation, and the cosine of its preconditioned gradient.

    Args:
        comparison: From :func:`~lightning_kfc.analysis.compare_curvature`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    names = [name for name in TITLES if any(name in [*layer.names()] for layer in comparison.layers.values())]
    width = 0.8 / max(1, len(names))
    with style():
        figure, ((errors, cosines),) = grid(1, 2, 4.6, 2.7)
        for position, (colour, name) in enumerate(zip(COLOURS, names, strict=False)):
            for place, layer in enumerate(comparison.layers.values()):
                if name not in [*layer.names()]:
                    continue
                x = place + (position - (len(names) - 1) / 2) * width
                label = TITLES[name] if place == 0 else None
                errors.bar(x, layer[name].error, width, color=colour, label=label)
                cosines.bar(x, layer[name].cosine, width, color=colour)
        for axis in (errors, cosines):
            axis.set_xticks(range(len(comparison.layers)), list(comparison.layers))
        errors.set_title("relative error of the block (Frobenius norm)")
        cosines.set_title(f"cosine to the exact step, damping {comparison.damping:g}")
        cosines.set_ylim(top=1.0)
        figure.legend(loc="outside lower center", ncols=5)
        return figure


def _points(values: Tensor, floor: float) -> tuple[list[int], list[float]]:
    """Numbers and values of eigenvalues above the floor, evenly spread over the logarithm of the number."""
    count = int((values > floor).sum())
    last = max(1, count - 1)
    places = sorted({round(math.expm1(i / (MOST_POINTS - 1) * math.log1p(last))) for i in range(MOST_POINTS)})
    kept = [place for place in places if place < count]
    return [place + 1 for place in kept], [float(values[place]) for place in kept]
