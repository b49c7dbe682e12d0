"""Small modules, data and real Trainers for the tests that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback

Loss = Callable[[Tensor, Tensor], Tensor]

#: Lightning's own advice, of no concern to tests.
QUIET = (
    "ignore:.*does not have many workers.*",
    "ignore:.*`isinstance.treespec, LeafSpec.`.*",
    "ignore:.*The number of training batches.*",
)


def conv_net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 3))


def dense_net(*, batch_norm: bool = False) -> nn.Sequential:
    norm = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), *norm, nn.Tanh(), nn.Linear(8, 3))


def images(count: int = 24, *, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


class Classifier(pl.LightningModule):
    """A classifier with hooks that a test can overwrite on the instance."""

    def __init__(
        self,
        net: nn.Module | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        loss: Loss = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.net = conv_net() if net is None else net
        self.loss = loss
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class Watch(pl.Callback):
    """Calls a function in one hook, with the hook's own arguments."""

    def __init__(self, hook: str, function: Callable[..., None]) -> None:
        setattr(self, hook, function)


def trainer(callbacks: Sequence[pl.Callback], *, max_steps: int = 4, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_steps=max_steps, callbacks=list(callbacks), **{**defaults, **options})


def loader(data: Any = None, *, batch_size: int = 8, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(images() if data is None else data, batch_size=batch_size, shuffle=shuffle)


def fit(
    module: pl.LightningModule,
    *,
    kfc: KFCCallback | None = None,
    data: Any = None,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> pl.Trainer:
    """Train; ``kfc`` comes before the other callbacks."""
    own = [] if kfc is None else [kfc]
    used = trainer([*own, *callbacks], **options)
    used.fit(module, loader() if data is None else data)
    return used


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


def hooks_of(model: nn.Module) -> list[str]:
    """The hooks on a model's modules, by name."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [f"{name}.{kind}" for name, m in model.named_modules() for kind in kinds if getattr(m, kind, None)]
