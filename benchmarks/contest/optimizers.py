"""Steppers: a plain optimizer, or one with gradients preconditioned by KFC, with or without averaged iterates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_kfc import KFC
from lightning_kfc.callback.averaged_statistics import newest_share


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch.

    Attributes:
        model: The model.
        loss: A function of outputs and targets to a scalar.
        inputs: The inputs, by example.
        targets: The targets, by example.
    """

    model: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    def __call__(self) -> Tensor:
        """Evaluate the loss."""
        return self.loss(self.model(self.inputs), self.targets)


class Stepper(ABC):
    """Makes training steps."""

    @property
    def averaged(self) -> nn.Module | None:
        """A model with averaged weights, which is evaluated instead of the trained one; None without an average."""
        return None

    @abstractmethod
    def step(self, compute_loss: BatchLoss) -> None:
        """Make forward, backward and update on the batch of ``compute_loss``."""


class PlainStepper(Stepper):
    """Plain optimizers, each for its own parameters."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def step(self, compute_loss: BatchLoss) -> None:
        """See :class:`Stepper`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        compute_loss().backward()
        for optimizer in self.optimizers:
            optimizer.step()


class KFCStepper(Stepper):
    """An optimizer with gradients preconditioned by KFC, including reviews."""

    def __init__(self, kfc: KFC, optimizer: Optimizer) -> None:
        self.kfc = kfc
        self.optimizer = optimizer

    def step(self, compute_loss: BatchLoss) -> None:
        """See :class:`Stepper`."""
        self.optimizer.zero_grad()
        with self.kfc.capture():
            loss = compute_loss()
        self.kfc.back_propagate(loss)
        loss.backward()
        # Includes the refresh, as in the callback, when the memory of the graph is free again.
        self.kfc.precondition(optimizer=self.optimizer)
        self.optimizer.step()
        self.kfc.review(optimizer=self.optimizer)


class TimedStepper(KFCStepper):
    """KFC with the clock of the callback."""

    def step(self, compute_loss: BatchLoss) -> None:
        """See :class:`Stepper`."""
        self.kfc.times.begin_step(compute_loss.inputs.device)
        super().step(compute_loss)
        self.kfc.times.end_step()


class AveragingStepper(Stepper):
    """Another stepper, whose weights are averaged exponentially after each step; buffers are copied.

    Args:
        stepper: The other stepper.
        model: Its model.
        decay: The decay of the average; at step k it is at most 1 - 10/(k + 9).
    """

    def __init__(self, stepper: Stepper, model: nn.Module, decay: float) -> None:
        def mix(averaged: Tensor, current: Tensor, step: Tensor | int) -> Tensor:
            return torch.lerp(averaged, current, newest_share(float(step) + 1, decay))

        self._stepper = stepper
        self._model = model
        self._average = AveragedModel(model, avg_fn=mix)

    @property
    def averaged(self) -> nn.Module:
        """See :class:`Stepper`."""
        return self._average

    def step(self, compute_loss: BatchLoss) -> None:
        """See :class:`Stepper`."""
        self._stepper.step(compute_loss)
        self._average.update_parameters(self._model)


@dataclass(frozen=True)
class Contestant:
    """An optimizer in the benchmark.

    Attributes:
        name: Its name on the command line and in files.
        title: Its name in tables and plots.
        make: A function of model, learning rate and seed to a stepper.
        grid: The tried learning rates; a single one is not tuned.
        takes_from: The contestant whose tuned learning rate is used; None if it is tuned itself.
    """

    name: str
    title: str
    make: Callable[[nn.Module, float, int], Stepper]
    grid: tuple[float, ...]
    takes_from: str | None = None

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is chosen on a grid."""
        return len(self.grid) > 1
