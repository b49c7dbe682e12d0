"""The cost of unusual layers, relative to their forward and backward: ``python -m benchmarks.cost.layer_cost``.

For each layer, the CPU time of its forward and backward (to its parameters, and to an input with a derivative), of its
statistics of one batch (A in the forward, G from the derivative), of one refresh of its inverse, and of one
preconditioned gradient, without the back-propagation of the seeds, which all layers share. Each round does all of them
once, the order reversed every other round; numbers are medians over rounds of the quotients within a round. *Amortised*
is the mean cost of a step with the callback's default periods: statistics over T_cov, inverse over T_inv, and the
preconditioned gradient of every step. *Dense* are the numbers with a pair of dense factors for each group
(``max_factor_dim=None``), if the default has another form (:mod:`lightning_kfc.factors.cost`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paths import RESULTS
from lightning_kfc.curvature.find_layers import find_layers
from lightning_kfc.curvature.gradients import gradients_of
from lightning_kfc.factors.inverses import CholeskyInverse
from lightning_kfc.layers import Forward
from lightning_kfc.settings import Settings

#: The layers by title: the module, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise 31 x 31, 32 channels, 32 x 32": (lambda: nn.Conv2d(32, 32, 31, padding=15, groups=32), (8, 32, 32, 32)),
    "depthwise 7 x 7 (ConvNeXt), 96 channels, 28 x 28": (
        lambda: nn.Conv2d(96, 96, 7, padding=3, groups=96),
        (16, 96, 28, 28),
    ),
    "depthwise 13 x 13, 32 channels, 32 x 32": (lambda: nn.Conv2d(32, 32, 13, padding=6, groups=32), (8, 32, 32, 32)),
    "grouped 3 x 3 (ResNeXt), 128 channels in 32 groups, 28 x 28": (
        lambda: nn.Conv2d(128, 128, 3, padding=1, groups=32),
        (16, 128, 28, 28),
    ),
    "dilated in one dimension, kernel 65, dilation 4, 16 channels, length 2,048": (
        lambda: nn.Conv1d(16, 16, 65, padding=128, dilation=4),
        (8, 16, 2048),
    ),
    "3 x 3, 16 channels, 256 x 256": (lambda: nn.Conv2d(16, 16, 3, padding=1), (4, 16, 256, 256)),
    "transposed 4 x 4, stride 2, 64 to 32 channels, 16 x 16": (
        lambda: nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        (16, 64, 16, 16),
    ),
    "linear 9,216 to 128, a flat image": (lambda: nn.Linear(9216, 128), (64, 9216)),
    "4 x 4, 512 channels to 1 (PatchGAN), 16 x 16": (lambda: nn.Conv2d(512, 1, 4), (4, 512, 16, 16)),
    "linear 8,192 to 256": (lambda: nn.Linear(8192, 256), (256, 8192)),
    "embedding of 50,000 tokens, 128 features": (lambda: nn.Embedding(50_000, 128), (16, 256)),
}


@dataclass(frozen=True)
class Pieces:
    """The pieces of work of a layer; ``form`` is its factors in words."""

    own: Callable[[], object]
    statistics: Callable[[], object]
    inverse: Callable[[], object]
    solve: Callable[[], object]
    form: str

    def named(self) -> dict[str, Callable[[], object]]:
        """The pieces by name."""
        return {"own": self.own, "statistics": self.statistics, "inverse": self.inverse, "solve": self.solve}


def pieces(title: str, *, cost_rule: bool) -> Pieces:
    """The work of a layer, with the library's defaults.

    Args:
        title: A key of :data:`LAYERS`.
        cost_rule: Whether ``max_factor_dim`` and the cost rule choose the form; else all factors are dense.
    """
    torch.manual_seed(0)
    make, shape = LAYERS[title]
    module, settings = make(), Settings() if cost_rule else Settings(max_factor_dim=None)
    tokens = isinstance(module, nn.Embedding)
    read = torch.randint(0, 50_000, shape) if tokens else torch.randn(shape).requires_grad_()
    layer = find_layers(nn.Sequential(module), settings).layers["0"]
    output = module(read)
    upstream = torch.randn_like(output)
    forward = Forward((read.detach(),), {}, output.detach())

    def own() -> None:
        module.zero_grad()
        module(read).backward(upstream)

    def statistics() -> Any:
        with torch.no_grad():
            return layer.adapter.statistics(layer.adapter.record(forward), upstream)

    layer.add(statistics())
    assert layer.pending is not None
    layer.fold(layer.pending, 0.8)
    own()
    gradient: Tensor = layer.matrix(gradients_of(layer.trained_parameters()) or {})
    rows = output[..., 0].numel() if gradient.shape[0] == 1 and not isinstance(module, nn.Embedding) else None

    def inverse() -> None:
        with torch.no_grad():
            layer.take(layer.refreshed(CholeskyInverse, 0.01, 0.0), step=0)

    inverse()

    def solve() -> Tensor:
        assert layer.inverse is not None
        with torch.no_grad():
            return layer.inverse.for_low_rank(rows).solve(gradient)

    shapes = layer.adapter.factor_shapes()
    form = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    return Pieces(own, statistics, inverse, solve, form)


def measure(title: str, rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """The cost of a layer with and without the cost rule, forward and backward = 1."""
    forms = {"kfc": pieces(title, cost_rule=True)}
    full = pieces(title, cost_rule=False)
    if full.form != forms["kfc"].form:
        forms["full"] = full
    todo = {(form, name): work for form, own in forms.items() for name, work in own.named().items()}
    todo.pop(("full", "own"), None)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in todo}
    for number in range(rounds):
        for key in list(todo)[:: 1 if number % 2 else -1]:
            started = clock()
            todo[key]()
            taken[key].append(clock() - started)
    result: dict[str, Any] = {"title": title, "own_seconds": median(taken["kfc", "own"])}
    for form, own in forms.items():
        costs = {
            name: median(a / b for a, b in zip(taken[form, name], taken["kfc", "own"], strict=True))
            for name in ("statistics", "inverse", "solve")
        }
        result[form] = {"form": own.form, **costs}
    return result


def amortised(costs: dict[str, Any]) -> float:
    """The mean cost of a step with the callback's default periods."""
    settings = Settings()
    assert isinstance(settings.factor_every_n_steps, int)
    assert isinstance(settings.inverse_every_n_steps, int)
    statistics = float(costs["statistics"]) / settings.factor_every_n_steps
    return statistics + float(costs["inverse"]) / settings.inverse_every_n_steps + float(costs["solve"])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each layer, and a second row for the dense form if the default has another one."""
    lines = [
        "| layer | factors | statistics | inverse | a step with both | preconditioning | a step, amortised |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for form, title in (("kfc", result["title"]), ("full", "dense")):
            if form in result:
                costs = result[form]
                due = costs["statistics"] + costs["inverse"]
                numbers = [costs["statistics"], costs["inverse"], due, costs["solve"], amortised(costs)]
                lines.append(f"| {title} | {costs['form']} | {' | '.join(f'{n:.2f}' for n in numbers)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="titles of layers")
    parser.add_argument("--json", type=Path, default=RESULTS / "layer_cost.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [measure(title, options.rounds) for title in options.layers]
    print(table(results))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(
        "CPU time on one thread, the layer's own forward and backward = 1; float32, medians of "
        f"{options.rounds} interleaved rounds.\n\n{table(results)}\n"
    )


if __name__ == "__main__":
    main()
