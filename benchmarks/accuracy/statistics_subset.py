"""Error and cost of statistics from a part of the rows.

Run it by ``python -m benchmarks.accuracy.statistics_subset``.

A ResNet-20 is trained for a while on crops of natural photographs. Then, on the same weights, batches and seeds,
engines that differ in ``rows_per_dim`` alone take statistics. For each setting:

- error of A: the relative Frobenius distance to that from all rows, the root mean square over batches, median and
  largest over layers;
- cosine of the update to that from all rows, with factors averaged over the batches;
- cost: CPU time of a step that takes statistics, plain SGD step = 1.

The reference is the distance between A of different batches, divided by the root of two. It estimates the distance of A
to its expectation. An error well below the reference does no harm.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest.networks import resnet20
from benchmarks.paths import RESULTS
from lightning_kfc import KFC

SETTINGS = (64, 32, 16, 8, 4)
Batch = tuple[Tensor, Tensor]
Factors = dict[str, dict[str, Tensor]]


def photographs() -> list[Tensor]:
    """scikit-learn's two photographs, as ``(3, height, width)`` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]


def crops(images: list[Tensor], count: int, generator: torch.Generator) -> Batch:
    """Crops of 32 x 32 pixels at three scales; the class is the photograph and the fifth of its height."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    inputs, targets = [], []
    for _ in range(count):
        which, scale = draw(len(images)), 1 + draw(3)
        image, side = images[which], 32 * scale
        top, left = draw(image.shape[1] - side), draw(image.shape[2] - side)
        crop = image[:, top : top + side, left : left + side]
        inputs.append(F.avg_pool2d(crop.unsqueeze(0), scale)[0])
        targets.append(which * 5 + top * 5 // image.shape[1])
    return (torch.stack(inputs) - 0.45) / 0.25, torch.tensor(targets)


def trained(batches: Callable[[], Batch], steps: int) -> nn.Module:
    """A ResNet-20 after some steps of SGD."""
    torch.manual_seed(0)
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        inputs, targets = batches()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def engine(model: nn.Module, rows_per_dim: int | None, decay: float, seed: int = 0) -> KFC:
    """An engine that takes statistics at every step."""
    options: dict[str, Any] = {
        "factor_every_n_steps": 1,
        "inverse_every_n_steps": 1,
        "ema_decay": decay,
        "kl_clip": None,
    }
    return KFC(model, rows_per_dim=rows_per_dim, seed=seed, **options)


def observe(kfc: KFC, model: nn.Module, batch: Batch) -> None:
    """Take the statistics of one step, and a gradient, without a change of weights."""
    model.zero_grad()
    with kfc.capture():
        loss = F.cross_entropy(model(batch[0]), batch[1])
    kfc.update(loss)
    loss.backward()
    kfc.precondition(lr=1.0)


def factors(model: nn.Module, rows_per_dim: int | None, batch: Batch, seed: int = 0) -> Factors:
    """A and G of every layer that has both, from one batch."""
    kfc = engine(copy.deepcopy(model), rows_per_dim, 0.0, seed)
    observe(kfc, kfc._model, batch)
    return {name: layer.factors for name, layer in kfc.layers.items() if set(layer.factors) == {"A", "G"}}


def update(model: nn.Module, rows_per_dim: int | None, batches: list[Batch]) -> Tensor:
    """The update of the convolutions and the linear layer, from factors averaged over batches."""
    kfc = engine(copy.deepcopy(model), rows_per_dim, 0.95)
    for batch in batches:
        observe(kfc, kfc._model, batch)
    layers = [layer for layer in kfc.layers.values() if set(layer.factors) == {"A", "G"}]
    return torch.cat([p.grad.flatten() for layer in layers for p in layer.parameters() if p.grad is not None])


def errors(found: list[Factors], exact: list[Factors], samples: float = 1.0) -> dict[str, float]:
    """The relative distance of A by layer, a root mean square over pairs, divided by the root of ``samples``."""
    result = {}
    for name in exact[0]:
        squares = [
            float((one[name]["A"] - other[name]["A"]).norm() / other[name]["A"].norm()) ** 2
            for one, other in zip(found, exact, strict=True)
        ]
        result[name] = math.sqrt(sum(squares) / len(squares) / samples)
    return result


def cost(model: nn.Module, settings: list[int | None], batch: Batch, rounds: int) -> dict[int | None, float]:
    """The CPU time of a step with statistics, by setting, plain SGD = 1; medians of interleaved rounds."""
    kfcs = {}
    for setting in settings:
        kfcs[setting] = KFC(
            copy.deepcopy(model), rows_per_dim=setting, factor_every_n_steps=1, inverse_every_n_steps=10**9
        )
    plain = copy.deepcopy(model)

    def sgd() -> None:
        plain.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()

    taken: dict[int | None, list[float]] = {setting: [] for setting in settings}
    for _ in range(rounds + 2):
        started = time.process_time()
        sgd()
        unit = time.process_time() - started
        for setting, kfc in kfcs.items():
            started = time.process_time()
            observe(kfc, kfc._model, batch)
            taken[setting].append((time.process_time() - started) / unit)
    return {setting: median(values[2:]) for setting, values in taken.items()}


def measure(batch_size: int, steps: int, batches: int, rounds: int) -> dict[str, Any]:
    """All numbers, for JSON."""
    images, generator = photographs(), torch.Generator().manual_seed(1)
    model = trained(lambda: crops(images, batch_size, generator), steps)
    data = [crops(images, batch_size, generator) for _ in range(batches)]
    exact = [factors(model, None, batch) for batch in data]
    reference = update(model, None, data)
    costs = cost(model, [None, *SETTINGS], data[0], rounds)
    noise = errors(exact[1:] + exact[:1], exact, samples=2.0)
    rows = []
    for setting in SETTINGS:
        found = errors([factors(model, setting, batch) for batch in data], exact)
        rows.append(
            {
                "rows_per_dim": setting,
                "median": median(found.values()),
                "largest": max(found.values()),
                "largest_to_noise": max(found[name] / noise[name] for name in found),
                "cosine": float(F.cosine_similarity(update(model, setting, data), reference, dim=0)),
                "cost": costs[setting],
            }
        )
    return {
        "batch_size": batch_size,
        "noise": median(noise.values()),
        "cost_of_all_rows": costs[None],
        "settings": rows,
    }


def table(numbers: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| `rows_per_dim` | error of A: median, largest | largest, noise = 1 | cosine of the update | cost |",
        "|---|---|---|---|---|",
        f"| all rows | 0 | 0 | 1 | {numbers['cost_of_all_rows']:.2f} |",
    ]
    lines += [
        f"| {row['rows_per_dim']} | {row['median']:.4f}, {row['largest']:.4f} | {row['largest_to_noise']:.2f} | "
        f"{row['cosine']:.4f} | {row['cost']:.2f} |"
        for row in numbers["settings"]
    ]
    lines.append(f"| noise: another batch | {numbers['noise']:.4f} | 1 | | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="of training before the measurement")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "statistics_subset.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    numbers = measure(options.batch_size, options.steps, options.batches, options.rounds)
    print(table(numbers))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
