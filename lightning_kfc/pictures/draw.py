"""The pictures: spectra, factors, autocorrelation, numbers over time, the time of a step, the coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kfc.monitoring.spatial import SpatialStatistics
from lightning_kfc.pictures.canvas import COLOURS, grid, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Most pixels per side of a heat map; larger matrices are averaged.
HEAT_MAP_PIXELS = 128
#: Eigenvalues below this share of the largest one are rounding errors in float32, and are not drawn.
SMALLEST_SHARE = 1e-7
#: The units of the engine's numbers, by key.
UNITS: Mapping[str, str] = {
    "kfc/kl_clip_factor": "ratio",
    "kfc/kl": "loss",
    "kfc/damping": "loss",
    "kfc/kl_clip": "loss",
    "kfc/reduction_ratio": "ratio",
    "kfc/predicted_decrease": "loss",
    "kfc/actual_decrease": "loss",
    "kfc/clipped_share": "share of steps",
    "kfc/cosine": "cosine",
    "kfc/factor_age": "steps",
    "kfc/inverse_age": "steps",
    "kfc/overhead": "% of the time",
    "kfc/time_statistics": "% of the time",
    "kfc/time_inverses": "% of the time",
    "kfc/time_preconditioning": "% of the time",
    "kfc/time_reviews": "% of the time",
    "kfc/nonfinite_events": "count",
    "kfc/undone_steps": "count",
    "kfc/shortened_steps": "count",
    "kfc/factor_every_n_steps": "steps",
    "kfc/inverse_every_n_steps": "steps",
    "kfc/bytes_held": "bytes",
    "kfc/update_to_weight": "ratio",
    "kfc/largest_curvature": "loss",
    "kfc/condition_A": "ratio",
    "kfc/condition_G": "ratio",
    "kfc/effective_rank_A": "directions",
    "kfc/effective_rank_G": "directions",
    "kfc/effective_rank_F": "directions",
}
#: The axis of the module's own metrics, whose units are unknown.
UNITS_OF_OTHERS = "as logged"
#: Most points of a line, nearly as many as a panel has pixels.
MOST_POINTS = 80

Spectra = Mapping[str, Mapping[str, Sequence[tuple[int, Tensor]]]]


def draw_spectra(spectra: Spectra) -> Figure:
    """The eigenvalues of each layer's factors, one line for each step.

    Args:
        spectra: By layer and factor (``"A"``, ``"G"``): steps with eigenvalues, descending.
    """
    with style():
        figure, axes = _panels(spectra, 3.4, 2.0)
        for row, (layer, factors) in zip(axes, spectra.items(), strict=True):
            for axis, (name, snapshots) in zip(row, factors.items(), strict=False):
                for share, (step, values) in _shaded(snapshots):
                    largest = float(values[:1].clamp(min=0).sum())
                    places = _spread(len(values))
                    drawn = [float(v) if v > SMALLEST_SHARE * largest else math.nan for v in values[places]]
                    numbers = [place + 1 for place in places]
                    axis.plot(numbers, drawn, color=_shade(share), linewidth=1.2, label=f"step {step}")
                if any(float(values.max()) > 0 for _, values in snapshots):
                    _logarithmic(axis)
                axis.set_xlabel("eigenvalue number")
                axis.xaxis.set_major_locator(_whole_numbers())
                axis.set_title(f"{layer}  {name} ({len(snapshots[-1][1])})" if snapshots else f"{layer}  {name}")
        _legend_of_steps(axes[0][0] if axes else None)
        return figure


def draw_factors(factors: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """The magnitudes of the correlations in each factor, as heat maps.

    Args:
        factors: By layer and name; ``(d, d)``, or ``(groups, d, d)`` of which the first group is drawn. Diagonal
            factors, ``(groups, d)``, are left out.
    """
    kept = {
        layer: {name: (f[0] if f.ndim == 3 else f) for name, f in own.items() if f.shape[-1] == f.shape[-2]}
        for layer, own in factors.items()
    }
    with style():
        figure, axes = _panels(kept, 2.4, 2.2)
        image: Any = None
        for row, (layer, own) in zip(axes, kept.items(), strict=True):
            for axis, (name, factor) in zip(row, own.items(), strict=False):
                image = axis.imshow(_correlations(factor), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
                axis.set_title(f"{layer}  {name} ({len(factor)})")
                axis.set(xticks=[], yticks=[])
        if image is not None:
            figure.colorbar(image, ax=[a for row in axes for a in row], label="|correlation|", shrink=0.6)
        return figure


def draw_autocorrelation(statistics: Sequence[SpatialStatistics]) -> Figure:
    """Maps of the correlation between two locations, by their offset: the paper's sec. 5.1.

    Args:
        statistics: The statistics of activations and derivatives.
    """
    layers: dict[str, dict[str, SpatialStatistics]] = {}
    for entry in statistics:
        layers.setdefault(entry.layer, {})[entry.quantity] = entry
    with style():
        figure, axes = _panels(layers, 2.5, 2.2, columns=2)
        image: Any = None
        for row, (layer, own) in zip(axes, layers.items(), strict=True):
            for axis, quantity in zip(row, ("activations", "derivatives"), strict=True):
                if quantity not in own:
                    axis.set_axis_off()
                    continue
                values = own[quantity].autocorrelation
                r_y, r_x = (size // 2 for size in values.shape)
                extent = (-r_x - 0.5, r_x + 0.5, r_y + 0.5, -r_y - 0.5)
                image = axis.imshow(values.tolist(), vmin=-1, vmax=1, cmap="RdBu_r", extent=extent)
                axis.set_xticks([-r_x, 0, r_x])
                axis.set_yticks([-r_y, 0, r_y])
                axis.set_title(f"{layer}  {quantity}\nnearest {own[quantity].nearest:.2f}")
        if image is not None:
            figure.colorbar(image, ax=[a for row in axes for a in row], label="correlation", shrink=0.6)
        return figure


def draw_numbers(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Numbers over the optimizer steps, a panel for each key.

    Args:
        history: By key: steps with numbers. Numbers that are not finite leave a gap.
    """
    columns = 3
    with style():
        figure, axes = grid(max(1, -(-len(history) // columns)), columns, 2.9, 1.9)
        panels = [axis for row in axes for axis in row]
        for axis, (key, points) in zip(panels, history.items(), strict=False):
            values = [value if math.isfinite(value) else math.nan for _, value in points]
            axis.plot([step for step, _ in points], values, color=COLOURS[0], linewidth=1.2)
            if len(points) == 1:
                axis.plot([points[0][0]], values, "o", color=COLOURS[0], markersize=3)
            finite = [value for value in values if not math.isnan(value)]
            if finite and min(finite) > 0 and max(finite) > 30 * min(finite):
                _logarithmic(axis)
            axis.set_title(key)
            axis.set_xlabel("optimizer step")
            axis.xaxis.set_major_locator(_whole_numbers())
            axis.set_ylabel(UNITS.get(key.removesuffix("_median"), UNITS_OF_OTHERS))
        for axis in panels[len(history) :]:
            axis.set_axis_off()
        return figure


def draw_step_time(parts: Mapping[str, float]) -> Figure:
    """The mean time of a step, by phase, as one bar.

    Args:
        parts: Seconds by phase, in the order of drawing.
    """
    total = sum(parts.values())
    with style():
        figure, ((axis,),) = grid(1, 1, 6.8, 1.7)
        start = 0.0
        for colour, (name, seconds) in zip(COLOURS, parts.items(), strict=False):
            share = 100 * seconds / total if total else 0.0
            label = f"{name}: {1e3 * seconds:.3g} ms ({share:.1f}%)"
            axis.barh([0], [1e3 * seconds], left=1e3 * start, color=colour, label=label, height=0.6)
            start += seconds
        axis.set(xlabel="milliseconds a step", yticks=[])
        axis.spines["left"].set_visible(False)
        if parts:
            figure.legend(loc="outside upper left", ncols=2)
        return figure


def draw_coverage(table: str) -> Figure:
    """A coverage table as a picture of its text.

    Args:
        table: ``str(kfc.coverage())``.
    """
    lines = table.splitlines()
    with style():
        figure, ((axis,),) = grid(1, 1, max(4.0, 0.085 * max(map(len, lines), default=1)), 0.3 + 0.17 * len(lines))
        axis.set_axis_off()
        axis.text(0, 1, table, family="monospace", fontsize=9, va="top", transform=axis.transAxes, parse_math=False)
        return figure


def _panels(
    layers: Mapping[str, Mapping[str, object]], width: float, height: float, columns: int | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A row of panels for each layer; empty panels are hidden."""
    count = columns or max([1, *(len(own) for own in layers.values())])
    figure, axes = grid(max(1, len(layers)), count, width, height)
    for row, own in zip(axes, layers.values(), strict=False):
        for axis in row[len(own) :] if columns is None else ():
            axis.set_axis_off()
    if not layers:
        for axis in axes[0]:
            axis.set_axis_off()
        axes[0][0].set_title("nothing was recorded yet")
        axes = []
    return figure, axes


def _spread(count: int) -> list[int]:
    """At most :data:`MOST_POINTS` indices, evenly spread, including the first and the last."""
    if count <= MOST_POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]


def _shaded(snapshots: Sequence[tuple[int, Tensor]]) -> list[tuple[float, tuple[int, Tensor]]]:
    """Snapshots with their relative time, from 0 to 1."""
    return [(i / max(1, len(snapshots) - 1), snapshot) for i, snapshot in enumerate(snapshots)]


def _shade(share: float) -> Any:
    import matplotlib as mpl

    # The yellow at the end of the map is too light for a line.
    return mpl.colormaps["viridis"](0.85 * (1 - share))


def _logarithmic(axis: Axes) -> None:
    """A logarithmic axis without minor ticks, which take most of the time to draw."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    if high < 100 * low:
        # At least one whole decade, for two ticks.
        axis.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True)


def _legend_of_steps(axis: Axes | None) -> None:
    """A legend of the first and the last step; all steps would hide the lines."""
    if axis is None:
        return
    handles, labels = axis.get_legend_handles_labels()
    ends = sorted({0, len(handles) - 1}) if handles else []
    if ends:
        axis.legend([handles[i] for i in ends], [labels[i] for i in ends])


def _correlations(factor: Tensor) -> list[list[float]]:
    """The magnitudes of the correlations; rows of zeros stay 0."""
    factor = factor.detach().double()
    deviations = factor.diagonal().clamp(min=0).sqrt()
    scale = torch.where(deviations > 0, 1 / deviations, torch.zeros_like(deviations))
    values = (factor * scale.unsqueeze(0) * scale.unsqueeze(1)).abs()
    if len(values) > HEAT_MAP_PIXELS:
        values = F.adaptive_avg_pool2d(values[None], (HEAT_MAP_PIXELS, HEAT_MAP_PIXELS))[0]
    shown: list[list[float]] = values.cpu().tolist()
    return shown
