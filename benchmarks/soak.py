"""A long training under the callback: ``python -m benchmarks.soak --steps 10000``.

Memory must stay flat and nothing may be left attached. Resident memory (Linux only), live tensors and hooks are
sampled while training runs, after a warm-up of a tenth of the steps; the exit status tells whether they grew.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback

#: Growth of the resident memory that is taken for the allocator's own, in MiB.
SLACK_MIB = 16.0


class ConvNet(pl.LightningModule):
    """A small net with convolutions, batch norm, dropout and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Conv2d(8, 8, 3, stride=2)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The cross entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self.head(self.net(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The paper's optimizer, at a rate that random labels stand for long."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096 / 2**20


def live_tensors() -> int:
    """Tensors that Python can reach."""
    gc.collect()
    # By type: asking some objects for their class would load what they stand for.
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def attached_hooks(module: nn.Module) -> int:
    """Forward and backward hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


class Sampler(pl.Callback):
    """Samples and prints the three numbers some twenty times, the first time after the warm-up."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // 20)
        self.start = steps // 10
        self.samples: list[tuple[int, float, int, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Sample, where due."""
        step = trainer.global_step
        if step >= self.start and step % self.every == 0:
            self.samples.append((step, resident_mib(), live_tensors(), attached_hooks(pl_module)))
            print("step {:7d}   resident {:8.1f} MiB   tensors {:5d}   hooks {}".format(*self.samples[-1]), flush=True)


def soak(steps: int, **options: Any) -> list[str]:
    """Train for so many steps, print the samples, and return what is wrong."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 10, 10), torch.randint(0, 10, (64,)))
    module, kfc, sampler = ConvNet(), KFCCallback(**options), Sampler(steps)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[kfc, sampler],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    first, last = sampler.samples[0], sampler.samples[-1]
    events = str(kfc.kfc.events) or "none"
    print(f"growth: {last[1] - first[1]:+.1f} MiB, {last[2] - first[2]:+d} tensors; events: {events}")
    wrong = []
    if last[1] - first[1] > SLACK_MIB:
        wrong.append(f"resident memory grew by {last[1] - first[1]:.1f} MiB")
    if len({sample[2] for sample in sampler.samples}) > 1 and last[2] > first[2]:
        wrong.append(f"the number of live tensors grew from {first[2]} to {last[2]}")
    if any(sample[3] for sample in sampler.samples) or attached_hooks(module):
        wrong.append("hooks were left attached between steps")
    if "train_step_context" in vars(trainer.precision_plugin):
        wrong.append("the precision plugin was left patched")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        wrong.append("a weight is not finite")
    return wrong


def main() -> None:
    """Read the options and soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps (default: 10,000)")
    parser.add_argument("--inverse", default="cholesky", help="the callback's option (default: cholesky)")
    parser.add_argument("--every-step", action="store_true", help="make every step a due step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec.*", FutureWarning)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    every: dict[str, Any] = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1} if options.every_step else {}
    wrong = soak(options.steps, inverse=options.inverse, **every)
    print("\n".join(f"FAILED: {what}" for what in wrong) or "memory flat, no hook left")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
