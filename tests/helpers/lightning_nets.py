"""Tiny LightningModules in float64, a Trainer without noise, and closed forms for softmax regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 5, 3

#: Lightning's messages about small Trainers; those of the package are not filtered.
QUIET = [
    pytest.mark.filterwarnings(r"ignore:The '\w+_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


def vectors(examples: int = 8, seed: int = 0) -> TensorDataset:
    """Inputs ``(examples, FEATURES)`` and classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (examples,), generator=generator))


def images(examples: int = 8, seed: int = 0) -> TensorDataset:
    """Inputs ``(examples, 1, 6, 6)`` and classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 1, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (examples,), generator=generator))


def loader(data: TensorDataset, batch_size: int = 4) -> DataLoader[Any]:
    """The examples in order."""
    return DataLoader(data, batch_size=batch_size)


class Regression(LightningModule):
    """Softmax regression, whose factors have a closed form: one Linear layer, named ``head``."""

    def __init__(self, lr: float = 0.1, make_optimizer: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        self.lr = lr
        self.make_optimizer = make_optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        return F.cross_entropy(self(inputs), targets)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=self.lr)


class Manual(Regression):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class ConvNet(Regression):
    """A convolution with batch norm, then a Linear layer."""

    def __init__(self, lr: float = 0.1, make_optimizer: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__(lr, make_optimizer)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()).double()
        self.head = nn.Linear(2 * 4 * 4, CLASSES, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def trainer(*callbacks: Any, trainer_class: Any = Trainer, **options: Any) -> Any:
    """A quiet Trainer on the CPU, for one epoch."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return trainer_class(callbacks=list(callbacks), **{**defaults, **options})


def homogeneous(inputs: Tensor) -> Tensor:
    """Input rows with the trailing 1 of the bias."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)


def regression_factors(logits: Tensor, inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""A (E1) and G, :math:`\sum_i c_i(\mathrm{diag}\,p_i - p_i p_i^\top)`, of softmax regression."""
    rows = homogeneous(inputs)
    p = logits.softmax(1)
    return rows.T @ rows / len(rows), torch.diag((weights[:, None] * p).sum(0)) - (weights[:, None] * p).T @ p


def damped_solve(A: Tensor, G: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """E4 and E5 as one dense solve with the Kronecker product."""
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    root = damping**0.5
    A_damped = A + pi * root * torch.eye(len(A), dtype=A.dtype)
    G_damped = G + root / pi * torch.eye(len(G), dtype=G.dtype)
    return torch.linalg.solve(torch.kron(G_damped, A_damped), gradient.reshape(-1)).reshape(gradient.shape)


def head_gradient(model: Any) -> Tensor:
    """The gradient of ``head`` with the bias as last column."""
    return torch.cat([model.head.weight.grad, model.head.bias.grad[:, None]], 1)


def head_values(model: Any) -> Tensor:
    """The weights of ``head`` with the bias as last column."""
    return torch.cat([model.head.weight.detach(), model.head.bias.detach()[:, None]], 1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference by the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
