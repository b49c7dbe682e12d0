"""The tasks: a network with data, loss and target losses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest import data
from benchmarks.contest.attention_networks import LanguageModel, VisionTransformer
from benchmarks.contest.curves import HeldOut
from benchmarks.contest.data import Split
from benchmarks.contest.networks import conv_net, convolutional_autoencoder, deep_autoencoder, resnet20

#: The number of training examples for the training loss.
MEASURED = 1024


@dataclass(frozen=True)
class Goal:
    """The target losses, and the budget of a run.

    Attributes:
        targets: Training losses whose time is reported, the hardest last.
        budget: The largest number of iterations of a run.
        seconds: The largest number of CPU seconds of a run in the contest.
    """

    targets: tuple[float, ...]
    budget: int
    seconds: float = 25.0


@dataclass(frozen=True)
class Task:
    """A network with data, loss and goals.

    Attributes:
        name: Its name on the command line and in file names.
        title: Its description in tables and plots.
        make_model: Makes the network, initialised from the global random state.
        loss: A function of outputs and targets to a scalar.
        data: Returns inputs and targets, for training and held out.
        goals: Targets and budgets, by batch size.
        batch_size: Examples in a batch; one of ``goals``.
        augment: Changes a batch of inputs at random; None for no augmentation.
        accuracy: A function of outputs and targets to the accuracy; None without an accuracy.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], Split]
    goals: Mapping[int, Goal]
    batch_size: int
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    accuracy: Callable[[Tensor, Tensor], float] | None = field(default=None, kw_only=True)

    @property
    def goal(self) -> Goal:
        """Targets and budget at this batch size."""
        return self.goals[self.batch_size]

    @property
    def targets(self) -> tuple[float, ...]:
        """Training losses whose time is reported, the hardest last."""
        return self.goal.targets

    @property
    def budget(self) -> int:
        """The largest number of iterations of a run."""
        return self.goal.budget

    @property
    def label(self) -> str:
        """Name and batch size, for file names."""
        return f"{self.name}_b{self.batch_size}"

    def at(self, batch_size: int | None = None, budget: int | None = None) -> Task:
        """The task at another batch size or with another budget.

        Args:
            batch_size: One of ``goals``; None for the present one.
            budget: The number of iterations; None for the goal's.

        Raises:
            ValueError: If there is no goal for this batch size.
        """
        size = self.batch_size if batch_size is None else batch_size
        if size not in self.goals:
            raise ValueError(f"task {self.name!r} has goals for batches of {sorted(self.goals)}, got {size}.")
        goal = self.goals[size] if budget is None else replace(self.goals[size], budget=budget)
        return replace(self, batch_size=size, goals={**self.goals, size: goal})

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless whole batches, in a new order in each epoch."""
        split = self.data()
        inputs, targets = split.train_inputs, split.train_targets
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for indices in order.split(self.batch_size):
                if len(indices) == min(self.batch_size, len(inputs)):
                    batch = inputs[indices]
                    yield batch if self.augment is None else self.augment(batch, generator), targets[indices]

    def training_loss(self, model: nn.Module) -> float:
        """The loss on the first 1,024 training examples, not augmented, in evaluation mode."""
        split = self.data()
        return self._measure(model, split.train_inputs[:MEASURED], split.train_targets[:MEASURED], None)[0]

    def held_out(self, model: nn.Module, iteration: int) -> HeldOut:
        """Loss and accuracy on at most 2,048 held-out examples, in evaluation mode."""
        split = self.data()
        inputs, targets = split.test_inputs[: 2 * MEASURED], split.test_targets[: 2 * MEASURED]
        return HeldOut(iteration, *self._measure(model, inputs, targets, self.accuracy))

    @torch.no_grad()
    def _measure(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, accuracy: Callable[[Tensor, Tensor], float] | None
    ) -> tuple[float, float | None]:
        mode = model.training
        model.eval()
        outputs = model(inputs)
        model.train(mode)
        return float(self.loss(outputs, targets)), None if accuracy is None else accuracy(outputs, targets)


def summed_cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    """Bernoulli loss of an autoencoder: summed over pixels, mean over examples."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def next_byte_cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    """Loss of a language model in nats per byte: logits ``(N, S, V)``, next bytes ``(N, S)``."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def share_right(logits: Tensor, labels: Tensor) -> float:
    """The accuracy."""
    return float((logits.argmax(-1) == labels).float().mean())


TASKS = {
    task.name: task
    for task in (
        Task(
            name="conv",
            title="conv net, MNIST-5000",
            make_model=conv_net,
            loss=F.cross_entropy,
            data=data.mnist,
            goals={512: Goal((0.3, 0.0565, 0.03), 250), 128: Goal((0.3, 0.1, 0.025), 400)},
            batch_size=512,
            accuracy=share_right,
        ),
        Task(
            name="autoencoder",
            title="deep autoencoder, MNIST-5000",
            make_model=deep_autoencoder,
            loss=summed_cross_entropy,
            data=data.flat_pixels,
            goals={
                512: Goal((159.5, 120.0, 100.4), 600, seconds=50.0),
                128: Goal((159.5, 120.0, 94.7), 1100, seconds=45.0),
            },
            batch_size=512,
        ),
        Task(
            name="conv_autoencoder",
            title="conv autoencoder, MNIST-5000",
            make_model=convolutional_autoencoder,
            loss=summed_cross_entropy,
            data=data.images_to_themselves,
            goals={512: Goal((150.0, 100.0, 80.0), 400)},
            batch_size=512,
        ),
        Task(
            name="resnet",
            title="ResNet-20, half as wide, batch norm, shifted 16x16 MNIST-5000 on photographs",
            make_model=functools.partial(resnet20, width=8),
            loss=F.cross_entropy,
            data=data.digits_on_photographs,
            goals={128: Goal((1.0, 0.5, 0.35), 240)},
            batch_size=128,
            augment=data.shifted,
            accuracy=share_right,
        ),
        Task(
            name="vit",
            title="ViT, width 48, 4 blocks, MNIST-5000",
            make_model=VisionTransformer,
            loss=F.cross_entropy,
            data=data.mnist,
            goals={128: Goal((0.7, 0.3, 0.15), 450)},
            batch_size=128,
            accuracy=share_right,
        ),
        Task(
            name="language_model",
            title="causal transformer, width 64, 2 blocks, bytes of Python's help texts",
            make_model=LanguageModel,
            loss=next_byte_cross_entropy,
            data=data.topics_text,
            goals={128: Goal((2.5, 2.1, 1.8), 320)},
            batch_size=128,
            accuracy=share_right,
        ),
    )
}
