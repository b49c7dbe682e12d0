"""The growth of KFC's cost: ``python -m benchmarks.cost.growth``.

A stack of convolutions with ReLU is grown along one of five directions at a time. For each size: CPU seconds of the
step itself (forward, backward, SGD) and of KFC's phases (statistics of all rows, inverses, preconditioning), each the
least over a few steps, and the bytes of factors and inverses. Exponents are slopes of log cost against log size over
the three largest sizes, next to those of the leading terms of the count of operations.

The count also predicts a ResNet-50 on images of 224 x 224 in batches of 256, from this processor's rates on the stacks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cost.shapes import LARGEST, LayerShape, resnet50
from benchmarks.paths import PLOTS, RESULTS
from lightning_kfc import KFC
from lightning_kfc.factors.row_sampling import number_of_parts
from lightning_kfc.factors.running_average import stored_nbytes
from lightning_kfc.monitoring.timing import REST

#: The timed phases, with their names in ``StepTimes``.
PARTS = {"step": REST, "statistics": "statistics", "inverses": "inverses", "preconditioning": "preconditioning"}
TITLES = {"step": "forward, backward, SGD", **{part: part for part in list(PARTS)[1:]}, "bytes": "memory"}


@dataclass(frozen=True)
class Stack:
    """A stack of stride-1 convolutions of one width on square images, padded to keep their size."""

    batch: int = 32
    width: int = 32
    depth: int = 4
    side: int = 16
    kernel: int = 3

    def model(self) -> nn.Sequential:
        """The network, with a linear layer on the mean over positions."""
        layers: list[nn.Module] = []
        for _ in range(self.depth):
            layers += [nn.Conv2d(self.width, self.width, self.kernel, padding=self.kernel // 2), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, 10))

    def operations(self) -> dict[str, float]:
        """Floating-point operations of each phase of a step: the convolutions' products, two for a multiply-add."""
        d_out, d_in = self.width, self.width * self.kernel**2
        rows = self.batch * self.side**2
        lags = ((2 * self.kernel - 1) ** 2 + 1) // 2
        return {
            "step": self.depth * 6.0 * rows * d_in * d_out,
            "statistics": self.depth * 2.0 * rows * (lags * self.width**2 + d_out**2 + d_in * d_out),
            "inverses": self.depth * inversion(d_in, d_out),
            "preconditioning": self.depth * application(d_in, d_out),
        }


#: The sizes along each direction, and the exponents of each phase's leading term.
SIZES: dict[str, tuple[int, ...]] = {
    "batch": (8, 16, 32, 64, 128),
    "width": (16, 32, 64, 128),
    "depth": (2, 4, 8, 16),
    "side": (8, 16, 32, 64),
    "kernel": (1, 3, 5, 7),
}
THEORY: dict[str, dict[str, int]] = {
    "batch": {"step": 1, "statistics": 1, "inverses": 0, "preconditioning": 0, "bytes": 0},
    "width": {"step": 2, "statistics": 2, "inverses": 3, "preconditioning": 3, "bytes": 2},
    "depth": {"step": 1, "statistics": 1, "inverses": 1, "preconditioning": 1, "bytes": 1},
    "side": {"step": 2, "statistics": 2, "inverses": 0, "preconditioning": 0, "bytes": 0},
    "kernel": {"step": 2, "statistics": 2, "inverses": 6, "preconditioning": 4, "bytes": 4},
}


def inversion(d_in: int, d_out: int) -> float:
    """Operations of both inverses: d^3 / 3 for a triangle, 2 d^3 / 3 for the inverse from it."""
    return float(d_in**3 + d_out**3)


def application(d_in: int, d_out: int) -> float:
    """Operations of both products of E5."""
    return 2.0 * d_in * d_out * (d_in + d_out)


def measure(stack: Stack, steps: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Seconds of each phase, the least over steps, and bytes of factors and inverses."""
    torch.manual_seed(0)
    model = stack.model()
    inputs = torch.randn(stack.batch, stack.width, stack.side, stack.side)
    targets = torch.randint(10, (stack.batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kfc = KFC(model, factor_every_n_steps=1, inverse_every_n_steps=1, warmup_steps=0, rows_per_dim=None, kl_clip=1.0)
    # CPU time, since other processes may run.
    kfc.times._mark = clock  # type: ignore[method-assign]  # another clock
    taken: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(steps + 1):
        before = kfc.times.seconds()
        kfc.times.begin_step(inputs.device)
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(inputs), targets)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.times.end_step()
        after = kfc.times.seconds()
        if step:  # the first step includes the self-test
            for part, name in PARTS.items():
                taken[part].append(after[name] - before[name])
    return {
        **{part: min(values) for part, values in taken.items()},
        "bytes": float(sum(row.bytes for row in kfc.coverage())),
    }


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log size, by least squares over the three largest sizes."""
    x = [math.log(size) for size in sizes[-3:]]
    y = [math.log(cost) for cost in costs[-3:]]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def rates(results: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Operations per second of each phase: the median over the largest size along each direction."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for direction, costs in results.items():
        operations = replace(Stack(), **{direction: SIZES[direction][-1]}).operations()
        for part in PARTS:
            found[part].append(operations[part] / costs[-1][part])
    return {part: median(values) for part, values in found.items()}


def predicted_operations(layers: Sequence[LayerShape], batch: int, rows_per_dim: int | None) -> dict[str, float]:
    """Operations of a network's step; patches come from a part of the rows, and are unfolded."""
    total = dict.fromkeys(PARTS, 0.0)
    for layer in layers:
        d_in, d_out, rows = layer.d_in, layer.d_out, layer.rows * batch
        parts = number_of_parts(batch, layer.rows, d_in, rows_per_dim)
        total["step"] += 6.0 * rows * d_in * d_out
        # Half of the symmetric product for A, the whole product for G.
        total["statistics"] += rows / parts * d_in**2 + 2.0 * rows * (d_out**2 + d_in * d_out)
        total["inverses"] += inversion(*(d if d <= LARGEST else 0 for d in (d_in, d_out)))
        total["preconditioning"] += application(d_in, d_out)
    return total


def prediction(reached: dict[str, float], batch: int = 256) -> dict[str, Any]:
    """Seconds of each phase of a ResNet-50's step on this processor, and bytes."""
    layers = resnet50()
    operations = predicted_operations(layers, batch, 16)
    exact = predicted_operations(layers, batch, None)["statistics"]
    shapes = [shape for layer in layers for shape in layer.shapes().values()]
    held = sum(stored_nbytes(shape, torch.float32) + 4 * math.prod(shape) for shape in shapes)
    seconds = {part: operations[part] / reached[part] for part in PARTS}
    return {"seconds": seconds, "statistics_of_all_rows": exact / reached["statistics"], "bytes": held}


def tables(results: dict[str, list[dict[str, float]]], predicted: dict[str, Any]) -> str:
    """Markdown: the exponents, then the prediction."""
    keys = [*PARTS, "bytes"]
    lines = [
        f"| grows with | {' | '.join(TITLES[key] for key in keys)} |",
        f"|---|{'---|' * len(keys)}",
    ]
    for direction, costs in results.items():
        cells = [
            f"{exponent(SIZES[direction], [cost[key] for cost in costs]):.1f} ({THEORY[direction][key]})"
            for key in keys
        ]
        lines.append(f"| {direction}, {SIZES[direction][0]} to {SIZES[direction][-1]} | {' | '.join(cells)} |")
    seconds, step = predicted["seconds"], predicted["seconds"]["step"]
    lines += ["", "| ResNet-50, 224 x 224, batch 256, predicted | CPU seconds | the step itself = 1 |", "|---|---|---|"]
    rows = {
        **{TITLES[part]: seconds[part] for part in PARTS},
        "statistics of all rows, unfolded": predicted["statistics_of_all_rows"],
        "a mean step at T_cov 10, T_inv 100": step
        + seconds["statistics"] / 10
        + seconds["inverses"] / 100
        + seconds["preconditioning"],
    }
    lines += [f"| {title} | {value:.1f} | {value / step:.2f} |" for title, value in rows.items()]
    lines += ["", f"Its factors and inverses take {predicted['bytes'] / 1e9:.2f} GB."]
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Measured points of each phase along each direction, with the theoretical slope through the largest."""
    from matplotlib import pyplot as plt

    from benchmarks.contest.plots import OTHER_COLOURS, STYLE

    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(results), figsize=(13, 3.2), sharey=True, layout="constrained")
        for axis, (direction, costs) in zip(axes, results.items(), strict=True):
            sizes = SIZES[direction]
            for colour, part in zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", *OTHER_COLOURS), PARTS, strict=False):
                values = [cost[part] for cost in costs]
                axis.plot(sizes, values, "o", color=colour, label=TITLES[part], markersize=4)
                line = [values[-1] * (size / sizes[-1]) ** THEORY[direction][part] for size in sizes]
                axis.plot(sizes, line, color=colour, linewidth=0.8, alpha=0.6)
            axis.set(xscale="log", yscale="log", xlabel=direction)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.set_ylim(bottom=3e-4)
        axes[0].set_ylabel("CPU seconds")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(PARTS))
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--plot", type=Path, default=PLOTS / "growth.svg")
    parser.add_argument("--redraw", action="store_true", help="tables and plot of the saved numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.redraw:
        results = json.loads(options.json.read_text())
    else:
        results = {}
        for direction, sizes in SIZES.items():
            results[direction] = [measure(replace(Stack(), **{direction: size}), options.steps) for size in sizes]
    text = tables(results, prediction(rates(results)))
    print(text)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(
        f"Exponents measured on stacks of convolutions (theory in brackets); {Stack()} unless it grows.\n\n{text}\n"
    )
    plot(results, options.plot)


if __name__ == "__main__":
    main()
