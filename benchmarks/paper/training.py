"""Trains a network of the paper by a contestant, under Lightning's trainer, and records its errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from benchmarks.contest.data import Split
from benchmarks.devices import clock, device_of, quiet_trainer
from lightning_kfc import KFCCallback

#: Of the average of iterates: assumed, the paper's text was not at hand.
AVERAGE = 0.99
#: Training examples whose error is measured, the first ones.
MEASURED = 10_000
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Contestant:
    """A contestant, which trains by SGD with momentum.

    Attributes:
        title: Its name in tables.
        batch_size: Examples in a batch.
        momentum: SGD's.
        rates: Learning rates to search; a single one means that nothing is.
        callbacks: Makes the trainer's callbacks.
    """

    title: str
    batch_size: int
    momentum: float
    rates: tuple[float, ...]
    callbacks: Callable[[], list[pl.Callback]]


CONTESTANTS: Mapping[str, Contestant] = {
    "kfc": Contestant("KFC, defaults", 512, 0.5, (0.5,), lambda: [KFCCallback()]),
    "kfc_paper": Contestant(
        "KFC, as the paper",
        512,
        0.9,
        (0.01, 0.03, 0.1),
        lambda: [
            KFCCallback(rule="natural", damping=1e-3, kl_clip=1e-3, ema_decay=0.95, average_weights=AVERAGE),
        ],
    ),
    "sgd": Contestant("SGD", 128, 0.9, (1e-3, 3e-3, 1e-2), list),
    "sgd_averaged": Contestant(
        "SGD, averaged", 128, 0.9, (1e-3, 3e-3, 1e-2), lambda: [EMAWeightAveraging(decay=AVERAGE)]
    ),
}


@dataclass
class Run:
    """One training.

    Attributes:
        contestant: Who trained, a key of :data:`CONTESTANTS`.
        lr: SGD's learning rate.
        seed: Of the initial weights, the batches, and all else that is random.
        epochs: How often it went over the training examples.
        iterations: At which the errors were measured.
        seconds: Wall-clock seconds of training up to there, with its batches, without evaluation.
        training_errors: Shares of the first training examples that are wrong, in evaluation mode.
        test_errors: Shares of the test examples that are wrong.
    """

    contestant: str
    lr: float
    seed: int
    epochs: float
    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    training_errors: list[float] = field(default_factory=list)
    test_errors: list[float] = field(default_factory=list)


class Classifier(pl.LightningModule):
    """A network that learns by cross entropy, and enters its errors into a run at each validation.

    Args:
        net: Images to logits.
        run: Where the errors go.
        momentum: SGD's.
    """

    def __init__(self, net: nn.Module, run: Run, momentum: float) -> None:
        super().__init__()
        self.net, self.run, self.momentum = net, run, momentum
        self._wrong: list[list[Tensor]] = [[], []]
        self._seconds = self._resumed = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The cross entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def on_train_start(self) -> None:
        """Start the clock."""
        self._resumed = clock(self.device)

    def on_validation_start(self) -> None:
        """Stop the clock."""
        self._seconds += clock(self.device) - self._resumed
        self._wrong = [[], []]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Note which images get a wrong label."""
        images, labels = batch
        self._wrong[dataloader_idx].append(self.net(images).argmax(1) != labels)

    def on_validation_end(self) -> None:
        """Enter the errors, and go on with the clock."""
        training, test = (float(torch.cat(wrong).float().mean()) for wrong in self._wrong)
        self.run.iterations.append(self.trainer.global_step)
        self.run.seconds.append(round(self._seconds, 3))
        self.run.training_errors.append(round(training, 5))
        self.run.test_errors.append(round(test, 5))
        self._resumed = clock(self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.run.lr, momentum=self.momentum)


def train(
    data: Split,
    make_net: Callable[[Tensor], nn.Module],
    contestant: Contestant,
    run: Run,
    *,
    evaluations: int,
    accelerator: str,
) -> torch.device:
    """Train, and enter the errors into a run.

    Args:
        data: What is trained on.
        make_net: From the training images to a network.
        contestant: Who trains.
        run: With which learning rate, seed and epochs.
        evaluations: How often the errors are measured, evenly over the iterations.
        accelerator: Lightning's name of it.

    Returns:
        The device that trained.

    Raises:
        ValueError: If the training examples do not fill a batch.
    """
    examples = len(data.train_targets)
    if examples < contestant.batch_size:
        raise ValueError(
            f"{contestant.title} needs a batch of {contestant.batch_size}, and there are {examples} examples."
        )
    torch.manual_seed(run.seed)
    module = Classifier(make_net(data.train_inputs), run, contestant.momentum)
    training = TensorDataset(data.train_inputs, data.train_targets)
    order = RandomSampler(training, generator=torch.Generator().manual_seed(run.seed))
    measured = (
        TensorDataset(data.train_inputs[:MEASURED], data.train_targets[:MEASURED]),
        TensorDataset(data.test_inputs, data.test_targets),
    )
    steps = max(1, round(run.epochs * (examples // contestant.batch_size)))
    every = -(-steps // evaluations)
    trainer = quiet_trainer(
        accelerator,
        max_steps=steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=contestant.callbacks(),
    )
    # Whole batches from one index: a loader that gathers single images would cost as much as a small network.
    batches = BatchSampler(order, contestant.batch_size, drop_last=True)
    trainer.fit(
        module,
        DataLoader(training, sampler=batches, batch_size=None),
        [
            DataLoader(part, sampler=BatchSampler(SequentialSampler(part), EVALUATION_BATCH, False), batch_size=None)
            for part in measured
        ],
    )
    return device_of(trainer)
