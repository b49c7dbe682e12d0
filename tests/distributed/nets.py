"""Modules, data and Trainers that run alike on one rank and on several; everything in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_kfc import KFCCallback, register_adapter
from lightning_kfc.layers.norm import SyncBatchNormAdapter

CLASSES = 3
#: Exact Fisher, so that nothing is drawn; refreshed at every step, so that every step tests everything.
EXACT: dict[str, Any] = {
    "fisher": "exact",
    "rows_per_dim": None,
    "factor_every_n_steps": 1,
    "inverse_every_n_steps": 1,
    "damping": 0.05,
}


class SyncBatchNorm(torch.autograd.Function):
    """torch's synchronised batch norm on (N, C, H, W), which itself runs on accelerators only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ones = x.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), ones])
        if dist.is_initialized():
            dist.all_reduce(sums)
        count = sums[-1]
        mean, square = sums[:-1].view(2, -1) / count
        inverse_deviation = (square - mean.square() + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse_deviation, count.reshape(1))
        return _along(weight * inverse_deviation) * (x - _along(mean)) + _along(bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_deviation, count = ctx.saved_tensors
        normal = (x - _along(mean)) * _along(inverse_deviation)
        own = torch.stack([g.sum((0, 2, 3)), (g * normal).sum((0, 2, 3))])
        sums = own.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        of_mean, of_deviation = sums / count
        d_x = _along(weight * inverse_deviation) * (g - _along(of_mean) - normal * _along(of_deviation))
        return d_x, own[1], own[0], None


def _along(channels: Tensor) -> Tensor:
    return channels[:, None, None]


class SyncNorm(nn.Module):
    """As ``nn.SyncBatchNorm``, which DDP refuses on the CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.num_features, self.eps = channels, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return SyncBatchNorm.apply(x, self.weight, self.bias, self.eps)


class Branch(nn.Module):
    """A second layer sees some of the examples, on some ranks none, and is not called then; a third is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0.4).nonzero()[:, 0]
        always: Tensor = self.always(x)
        return always.index_add(0, chosen, self.sometimes(x[chosen])) if len(chosen) else always


def conv_net(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *between, nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, CLASSES)
    )


def branched_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), Branch(), nn.LayerNorm(8), nn.Linear(8, CLASSES))


def dense_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))


def synchronised_net() -> nn.Sequential:
    register_adapter(SyncNorm)(SyncBatchNormAdapter)
    return conv_net(SyncNorm(4))


def images(count: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


class Net(pl.LightningModule):
    """A classifier of images."""

    lr, momentum = 0.2, 0.5

    def __init__(self, make: Callable[[], nn.Module] = conv_net) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make().double()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def trainer(callback: KFCCallback | None, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=[] if callback is None else [callback], **{**defaults, **options})


def loader(data: TensorDataset, batch_size: int, tensor_parallel: int = 1) -> DataLoader[Any]:
    """The examples in order; what W ranks read in a step is what one reads whose batches are W times as large.

    Ranks that share a layer among them read the same.
    """
    sampler = None
    if dist.is_initialized():
        replicas, rank = dist.get_world_size() // tensor_parallel, dist.get_rank() // tensor_parallel
        sampler = DistributedSampler(data, replicas, rank, shuffle=False)
    return DataLoader(data, batch_size=batch_size, sampler=sampler)


def fit(
    module: pl.LightningModule,
    *,
    data: TensorDataset,
    batch_size: int,
    kfc: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Train, and give all weights, factors and inverses."""
    callback = KFCCallback(**{**EXACT, **(kfc or {})})
    trainer(callback, **options).fit(module, loader(data, batch_size))
    return outcome(module, callback)


def outcome(module: nn.Module, callback: KFCCallback) -> dict[str, Tensor]:
    """All weights, and all factors and inverses that this rank holds."""
    found = {name: value.detach().clone() for name, value in module.named_parameters()}
    for name, layer in callback.kfc.layers.items():
        found |= {f"{name}.{factor}": value for factor, value in layer.factors.items()}
        if layer.inverse is not None:
            found |= {
                f"{name}.{part}": value for part, value in layer.inverse.state().items() if isinstance(value, Tensor)
            }
    return found


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any tensor that both have; there must be the same ones."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    return max(_relative(found[name], expected[name]) for name in expected)


def _relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert bool(torch.isfinite(found).all())
    size = float(expected.abs().max())
    return float((found - expected).abs().max()) / size if size else float(found.abs().max())
