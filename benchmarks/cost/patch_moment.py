"""The cost of the second moment of patches, relative to the layer: ``python -m benchmarks.cost.patch_moment``.

For three convolutions of stride 1, the CPU time of A's exact total over all patches (E1), divided by that of the
layer's forward and backward (to its weight and to its input) on the same batch. *This library* uses products by lag,
without patches (:mod:`lightning_kfc.factors.convolution.patches`); *unfolding* makes all patches by
``torch.nn.functional.unfold`` and multiplies them by their transpose; *unfolding by chunks* holds at most 16 MiB of
patches, and multiplies half of each symmetric product. Each round does all of them once, the order reversed every other
round; numbers are medians over rounds of the quotients within a round.
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
from torch.nn import functional as F

from benchmarks.paths import RESULTS
from lightning_kfc.factors.convolution.geometry import Geometry
from lightning_kfc.factors.convolution.patches import image_chunks, patch_columns, patch_second_moment
from lightning_kfc.factors.statistics import gram

#: The compared forms, in the order of the table.
FORMS = {"kfc": "this library", "chunks": "unfolding by chunks", "unfold": "unfolding"}


@dataclass(frozen=True)
class Case:
    """A convolution of as many output channels as inputs, whose output is as large as its input.

    Attributes:
        channels: The channels.
        side: Height and width of the images.
        kernel: Height and width of the kernel.
        goal: The goal for the cost of A, the layer's forward and backward = 1.
    """

    channels: int
    side: int
    kernel: int
    goal: float

    def title(self) -> str:
        """The case in words."""
        k = self.kernel
        return f"{self.channels} channels, {self.side} x {self.side}, kernel {k} x {k}"


CASES = (Case(64, 32, 3, 0.8), Case(256, 8, 3, 1.2), Case(32, 14, 5, 2.0))


def works(case: Case, batch_size: int) -> dict[str, Callable[[], object]]:
    """The pieces of work by name: the layer's own, then each of ``FORMS``."""
    torch.manual_seed(0)
    layer = nn.Conv2d(case.channels, case.channels, case.kernel, padding=case.kernel // 2, bias=False)
    images = torch.randn(batch_size, case.channels, case.side, case.side)
    read = images.clone().requires_grad_()
    upstream = torch.randn_like(images)
    geometry = Geometry.of(layer.kernel_size, layer.stride, layer.padding, layer.dilation)

    def own() -> None:
        layer.zero_grad()
        read.grad = None
        layer(read).backward(upstream)

    def unfold() -> Tensor:
        columns = F.unfold(images, layer.kernel_size, padding=case.kernel // 2).transpose(0, 1).flatten(1)
        return columns @ columns.T

    def chunks() -> Tensor:
        parts = (gram(patch_columns(chunk, geometry).flatten(2))[0] for chunk in image_chunks(images, geometry))
        return sum(parts, images.new_zeros(()))

    def kfc() -> Tensor:
        return patch_second_moment(images, geometry, homogeneous=False)[0][0]

    return {"layer": own, "kfc": kfc, "chunks": chunks, "unfold": unfold}


def measure(case: Case, batch_size: int, rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """The cost of each form, relative to the layer, and the layer's seconds."""
    todo = works(case, batch_size)
    for work in todo.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in todo}
    for number in range(rounds):
        for name in list(todo)[:: 1 if number % 2 else -1]:
            started = clock()
            todo[name]()
            taken[name].append(clock() - started)
    cost = {form: median(a / b for a, b in zip(taken[form], taken["layer"], strict=True)) for form in FORMS}
    return {"title": case.title(), "goal": case.goal, "layer_seconds": median(taken["layer"]), **cost}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each convolution and number of threads."""
    lines = [
        f"| convolution | threads | {' | '.join(FORMS.values())} | goal |",
        f"|---|---|{'---|' * len(FORMS)}---|",
    ]
    for result in results:
        for case in result["cases"]:
            costs = " | ".join(f"{case[form]:.2f}" for form in FORMS)
            lines.append(f"| {case['title']} | {result['threads']} | {costs} | {case['goal']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, default=RESULTS / "patch_moment.json")
    options = parser.parse_args(arguments)
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        cases = [measure(case, options.batch_size, options.rounds) for case in CASES]
        results.append({"threads": threads, "batch_size": options.batch_size, "cases": cases})
    print(table(results))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(
        f"CPU time, the layer's own forward and backward = 1; batch {options.batch_size}, float32, medians of "
        f"{options.rounds} interleaved rounds.\n\n{table(results)}\n"
    )


if __name__ == "__main__":
    main()
