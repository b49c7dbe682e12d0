"""Tiny models and the one way in which the tests take an engine's factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfc import KFC, RefreshTiming
from tests.helpers import oracles


def double(*modules: nn.Module) -> nn.Sequential:
    """The modules in a row, in float64."""
    return nn.Sequential(*modules).double()


def data(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal float64 numbers that do not depend on what ran before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, count: int, seed: int = 2) -> Tensor:
    """Class indices that do not depend on what ran before."""
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def small_conv_net() -> nn.Sequential:
    """Two convolutions and a linear head on (N, 2, 6, 6), 3 outputs, float64."""
    return double(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def engine(model: nn.Module, **settings: Any) -> KFC:
    """A KFC with exact statistics at every step by default."""
    defaults: dict[str, Any] = {
        "fisher": "exact",
        "factor_every_n_steps": 1,
        "inverse_every_n_steps": 1,
        "damping": 1e-2,
        "kl_clip": None,
        "rows_per_dim": None,
        "timing": RefreshTiming(later_periods=1),
    }
    return KFC(model, **{**defaults, **settings})


def kronecker_layers(kfc: KFC) -> list[str]:
    """The names of the layers that have Kronecker factors."""
    return [name for name, layer in kfc.layers.items() if {"A", "G"} == set(layer.adapter.factor_shapes())]


def observe(model: nn.Module, loss: Callable[[], Tensor], **settings: Any) -> KFC:
    """A KFC that has seen one loss."""
    kfc = engine(model, **settings)
    with kfc.capture():
        value = loss()
    kfc.update(value)
    oracles.SOURCES[oracles.running_test()].add(kfc.batches.sources)
    return kfc


def train_step(kfc: KFC, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
    """One step of a plain loop."""
    optimizer.zero_grad()
    with kfc.capture():
        value = loss()
    kfc.update(value)
    value.backward()
    kfc.precondition(optimizer=optimizer)
    optimizer.step()
    return value.detach()
