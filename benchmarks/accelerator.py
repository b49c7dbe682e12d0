"""Costs and gains of KFC on an accelerator: ``python -m benchmarks.accelerator``.

A ResNet-50 is trained on synthetic images under Lightning's trainer, by SGD alone and with ``KFCCallback()`` beside it:
in float32, with bf16 autocast, and compiled. ``--device cpu --small`` tries the script on a small net, in a minute.

**Cost.** Trainings of SGD and of KFC take turns, the order reversed each round. A step's time is the wall clock between
the ends of two steps, the device synchronised. *Later* steps are those after the first 30, over whole periods of the
schedule; the unit is the median later step of SGD in the same round. Peak memory is what torch's allocator counts, with
the weights and the images.

**Convergence.** The training loss, averaged over the last pass over the images, of KFC at its defaults and of SGD with
each of some learning rates.

Inverses on a second CUDA stream are not measured: the package has no such option.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.contest.networks import resnet50
from benchmarks.contest.report import lists_on_one_line, times_table
from benchmarks.devices import clock, device_of, measured_on, quiet_trainer
from benchmarks.paths import RESULTS
from lightning_kfc import KFCCallback

#: Steps before the later ones: the first ten, which all refresh, and a period.
FIRST, EARLY = 10, 30


@dataclass(frozen=True)
class Workload:
    """A network, and how long it is trained.

    Attributes:
        title: Its name in tables.
        width: Of the ResNet.
        blocks: Of each of its stages.
        pixels: The images' side.
        classes: Of the images.
        batch_size: Images in a batch.
        batches: In a pass over the images.
        steps: Of a training whose cost is measured; the later ones are whole periods.
        rounds: How often each is repeated.
        convergence_steps: Of a training whose loss is measured.
        rates: SGD's learning rates.
        losses: Whose time is reported.
    """

    title: str
    width: int
    blocks: tuple[int, ...]
    pixels: int
    classes: int
    batch_size: int
    batches: int
    steps: int
    rounds: int
    convergence_steps: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]


FULL = Workload("ResNet-50", 64, (3, 4, 6, 3), 224, 100, 64, 16, 70, 3, 400, (0.01, 0.03, 0.1, 0.3), (1.0, 0.3, 0.1))
SMALL = Workload("small ResNet", 4, (1, 1), 32, 10, 16, 4, 50, 1, 20, (0.03, 0.1), (2.0, 1.0))

#: By name: the trainer's precision, and whether the network is compiled.
VARIANTS: Mapping[str, tuple[str, bool]] = {
    "float32": ("32-true", False),
    "bf16": ("bf16-mixed", False),
    "compile": ("32-true", True),
}


def synthetic(workload: Workload, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Batches of images that show a coarse pattern of their class under noise, on the device."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(workload.classes, 3, 7, 7, generator=generator)
    found = []
    for _ in range(workload.batches):
        labels = torch.randint(0, workload.classes, (workload.batch_size,), generator=generator)
        images = F.interpolate(patterns[labels], size=workload.pixels)
        images += torch.randn(images.shape, generator=generator)
        found.append((images.to(device), labels.to(device)))
    return found


class Classifier(pl.LightningModule):
    """A network that learns by cross entropy, by SGD."""

    def __init__(self, net: nn.Module, lr: float, momentum: float) -> None:
        super().__init__()
        self.net, self.lr, self.momentum = net, lr, momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The cross entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


@dataclass
class Steps(pl.Callback):
    """Records each step's time and loss, and the peak of the device's memory. The last one of the callbacks.

    Attributes:
        seconds: Of each step.
        losses: Of each step.
        peak: Bytes; None on a CPU, where torch counts none.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        if pl_module.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(pl_module.device)
        self._last = clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step."""
        now = clock(pl_module.device)
        self.seconds.append(now - self._last)
        self.losses.append(float(outputs["loss"]))
        self._last = clock(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the peak."""
        if pl_module.device.type != "cpu":
            self.peak = torch.accelerator.max_memory_allocated(pl_module.device)


def train(
    workload: Workload,
    accelerator: str,
    steps: int,
    *,
    lr: float | None,
    precision: Any = "32-true",
    compiled: bool = False,
) -> Steps:
    """Train anew.

    Args:
        workload: What.
        accelerator: Lightning's name of it.
        steps: How long.
        lr: SGD's learning rate, with momentum 0.9; None: KFC beside SGD(lr=0.5, momentum=0.5).
        precision: The trainer's.
        compiled: Whether the network is compiled.
    """
    torch.manual_seed(0)
    net: nn.Module = resnet50(workload.classes, workload.width, workload.blocks)
    if compiled:
        net.compile()
    recorded = Steps()
    callbacks: list[pl.Callback] = [recorded] if lr is not None else [KFCCallback(), recorded]
    module = Classifier(net, *((0.5, 0.5) if lr is None else (lr, 0.9)))
    trainer = quiet_trainer(accelerator, max_steps=steps, precision=precision, callbacks=callbacks)
    batches: Any = synthetic(workload, device_of(trainer))
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return recorded


def cost(seconds: Sequence[float], unit: float) -> dict[str, float]:
    """A training's first steps, and its median and mean later step, in units of a step of SGD."""
    later = seconds[EARLY:]
    return {"first": sum(seconds[:FIRST]) / unit, "median": median(later) / unit, "mean": fmean(later) / unit}


def measure_cost(workload: Workload, accelerator: str, variant: str) -> dict[str, Any]:
    """Medians over rounds: SGD's step in seconds, and what KFC costs in units of it, with both peaks."""
    precision, compiled = VARIANTS[variant]
    rounds: list[dict[str, Any]] = []
    for number in range(workload.rounds):
        recorded: dict[str, Steps] = {}
        for name in ("sgd", "kfc")[:: 1 if number % 2 else -1]:
            lr = 0.01 if name == "sgd" else None
            recorded[name] = train(workload, accelerator, workload.steps, lr=lr, precision=precision, compiled=compiled)
        unit = median(recorded["sgd"].seconds[EARLY:])
        peaks = {f"peak_{name}": steps.peak for name, steps in recorded.items()}
        rounds.append({"sgd": unit, **cost(recorded["kfc"].seconds, unit), **peaks})
    return {key: None if rounds[0][key] is None else median(found[key] for found in rounds) for key in rounds[0]}


def measure_convergence(workload: Workload, accelerator: str) -> dict[str, Any]:
    """By title of an optimizer: the mean loss of the last pass over the images at each step, and the seconds to it."""
    found = {}
    for title, lr in (("KFC, defaults", None), *((f"SGD, lr {rate:g}", rate) for rate in workload.rates)):
        recorded = train(workload, accelerator, workload.convergence_steps, lr=lr)
        losses = [fmean(recorded.losses[max(0, i + 1 - workload.batches) : i + 1]) for i in range(len(recorded.losses))]
        total, seconds = 0.0, []
        for step in recorded.seconds:
            total += step
            seconds.append(round(total, 3))
        found[title] = {"losses": [float(f"{loss:.4g}") for loss in losses], "seconds": seconds}
    return found


def reach(curve: Mapping[str, Sequence[float]], loss: float, batches: int) -> tuple[float, float]:
    """Iterations and seconds to a loss, from the first whole pass over the images on; infinite where never."""
    steps = range(batches - 1, len(curve["losses"]))
    first = next((i for i in steps if curve["losses"][i] <= loss), None)
    return (math.inf, math.inf) if first is None else (first + 1, curve["seconds"][first])


def markdown(workload: Workload, found: Mapping[str, Any]) -> str:
    """Tables of the cost and of the convergence."""
    lines = [
        f"{workload.title}, {workload.pixels} pixels, batch {workload.batch_size}. KFC's times are in steps of SGD, "
        f"memory in MiB. Measured on: {found['measured_on']['device']}.",
        "",
        "| | step of SGD, ms | KFC, median later step | mean later step | first ten steps | memory, SGD | KFC |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, entry in found["cost"].items():
        cells = [f"{1000 * entry['sgd']:.1f}", *(f"{entry[key]:.2f}" for key in ("median", "mean", "first"))]
        peaks = (entry["peak_sgd"], entry["peak_kfc"])
        cells += ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    curves = found["convergence"]
    columns = [
        {title: reach(curve, loss, workload.batches) for title, curve in curves.items()} for loss in workload.losses
    ]
    heads, titles = [f"{loss:g}" for loss in workload.losses], {title: title for title in curves}
    lines += ["", "Iterations / wall-clock seconds to a training loss; bold: the least time; -: never.", ""]
    return "\n".join([*lines, times_table("training loss", heads, titles, columns)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="Lightning's accelerator (default: the one that there is)")
    parser.add_argument("--small", action="store_true", help="a small net, to try the script")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, help="a folder (default: the repository's; nowhere for a small net)")
    options = parser.parse_args(arguments)
    if options.device == "auto" and not torch.accelerator.is_available():
        parser.error("torch finds no accelerator: run this on a GPU, or try it with --device cpu --small.")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    workload = SMALL if options.small else FULL
    device = device_of(quiet_trainer(options.device))
    found: dict[str, Any] = {
        "measured_on": measured_on(device),
        "cost": {variant: measure_cost(workload, options.device, variant) for variant in options.variants},
        "convergence": measure_convergence(workload, options.device),
    }
    text = markdown(workload, found)
    print(text)
    folder: Path | None = options.results or (None if options.small else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        content = lists_on_one_line(json.dumps(found, indent=1))
        (folder / "accelerator.json").write_text(content + "\n", "utf-8")
        (folder / "accelerator.md").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
