"""The contestants: each a name, a grid for its learning rate, and a way to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc import KFC


class Stepper(Protocol):
    """Makes one training step."""

    def step(self, compute_loss: Callable[[], Tensor]) -> None:
        """Forward, backward and update on the batch that ``compute_loss`` looks at."""


class PlainStepper:
    """An optimizer as it is."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, compute_loss: Callable[[], Tensor]) -> None:
        """See :class:`Stepper`."""
        self.optimizer.zero_grad()
        compute_loss().backward()
        self.optimizer.step()


class KFCStepper:
    """An optimizer whose gradients KFC preconditions."""

    def __init__(self, kfc: KFC, optimizer: Optimizer) -> None:
        self.kfc = kfc
        self.optimizer = optimizer

    def step(self, compute_loss: Callable[[], Tensor]) -> None:
        """See :class:`Stepper`."""
        self.optimizer.zero_grad()
        with self.kfc.capture():
            loss = compute_loss()
        self.kfc.update(loss)
        loss.backward()
        self.kfc.precondition(optimizer=self.optimizer)
        self.optimizer.step()


@dataclass(frozen=True)
class Contestant:
    """An optimizer in the benchmark.

    Attributes:
        name: Its name on the command line and in files.
        title: Its name in tables and plots.
        make: From a model, a learning rate and a seed to a stepper.
        grid: The learning rates tried; a single one means that nothing is tuned.
    """

    name: str
    title: str
    make: Callable[[nn.Module, float, int], Stepper]
    grid: tuple[float, ...]

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is chosen on a grid."""
        return len(self.grid) > 1


def _sgd(model: nn.Module, lr: float, seed: int) -> Stepper:
    return PlainStepper(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


def _adam(model: nn.Module, lr: float, seed: int) -> Stepper:
    return PlainStepper(torch.optim.Adam(model.parameters(), lr=lr))


def _kfc(model: nn.Module, lr: float, seed: int) -> Stepper:
    return KFCStepper(KFC(model, seed=seed), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5))


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("sgd", "SGD, momentum 0.9", _sgd, (0.02, 0.03, 0.05, 0.07, 0.1, 0.14)),
        Contestant("adam", "Adam", _adam, (0.0003, 0.001, 0.002, 0.005, 0.01, 0.02)),
        Contestant("kfc", "KFC, defaults", _kfc, (0.5,)),
    )
}
