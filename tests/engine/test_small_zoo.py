"""Small forms of networks that people build, a few steps each with the defaults: nothing unexplained happens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
from lightning_kfc.curvature.coverage import NO_STATISTICS
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]

STEPS, EXAMPLES, CLASSES = 12, 16, 3


class ConvNeXt(nn.Module):
    """A block with a depthwise kernel of 7 x 7 and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 2, 2)
        self.depthwise, self.norm = nn.Conv2d(6, 6, 7, padding=3, groups=6), nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = nn.Parameter(1e-2 * torch.ones(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).movedim(1, -1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head((x + y.movedim(-1, 1)).mean((2, 3)))


class MobileNet(nn.Module):
    """An inverted bottleneck with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid()
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.depthwise(self.expand(x)))
        return self.head((y * self.gate(y)).mean((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, a skip connection, and a class for the mean of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        return self.out(torch.cat([skip, self.up(self.deep(skip).relu())], 1)).mean((2, 3))


class ViT(nn.Module):
    """Patches, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(0.02 * torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).mT
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.positions
        return self.head(self.block(y)[:, 0])


class Perceiver(nn.Module):
    """Latent queries that attend to the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.1 * torch.randn(1, 3, 8))
        self.read = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.read(x[:, 0])
        found, _ = self.attention(self.latents.expand(len(x), -1, -1), inputs, inputs, need_weights=False)
        return self.head(found.mean(1))


class GraphConvolution(nn.Module):
    """Features of nodes, mixed by an adjacency matrix and by scattered sums."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", (torch.rand(8, 8) > 0.5).float() / 4)
        self.register_buffer("neighbour", torch.arange(8).roll(1))
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.adjacency @ self.first(x[:, 0])).relu()
        y = torch.zeros_like(y).index_add(1, self.neighbour, y)
        return self.second(y).mean(1)


class WaveNet(nn.Module):
    """Dilated convolutions in one dimension with gates and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Conv1d(1, 4, 1)
        self.gates = nn.ModuleList(nn.Conv1d(4, 8, 2, dilation=d) for d in (1, 2, 4))
        self.skips = nn.ModuleList(nn.Conv1d(4, CLASSES, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y, out = self.begin(x.flatten(2)), torch.zeros(())
        for gate, skip in zip(self.gates, self.skips, strict=True):
            signal, opening = gate(F.pad(y, (gate.dilation[0], 0))).chunk(2, 1)
            y = y + signal.tanh() * opening.sigmoid()
            out = out + skip(y).mean(2)
        return out


class Experts(nn.Module):
    """A router that never chooses the last expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 3)
        self.experts = nn.ModuleList(nn.Linear(64, CLASSES) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        shares = self.router(flat).softmax(1)
        return sum(shares[:, k, None] * self.experts[k](flat) for k in range(3))


class Spectral(nn.Module):
    """Complex weights on a spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5, dtype=torch.cfloat) * 0.3)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x[:, 0]) * self.weight, s=(8, 8)).tanh().flatten(1))


class LoRA(nn.Module):
    """A frozen layer plus two small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(64, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.head((self.frozen(flat) + self.up(self.down(flat))).tanh())


class Splines(nn.Module):
    """Learned functions on the edges, as in a KAN: a raw parameter times a basis."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(64, 6)
        self.coefficients = nn.Parameter(0.2 * torch.randn(6, 5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x.flatten(1))
        basis = torch.exp(-((y[..., None] - torch.linspace(-2, 2, 5)) ** 2))
        return torch.einsum("nik,iko->no", basis, self.coefficients)


class Teacher(nn.Module):
    """A moving average of the network inside it, which takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, now in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(now, 0.1)
        return self.student(x) + 0.1 * self.teacher(x)


class Coupling(nn.Module):
    """Affine coupling layers of a flow, before a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 64)) for _ in range(2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flatten(1).chunk(2, 1)
        for net in self.nets:
            log_scale, shift = net(a).chunk(2, 1)
            a, b = b * log_scale.tanh().exp() + shift, a
        return self.head(torch.cat([a, b], 1))


class Recurrent(nn.Module):
    """A GRU that reads, an LSTM that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(8, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        read, last = self.encoder(x[:, 0])
        written, _ = self.decoder(read, (last, torch.zeros_like(last)))
        return self.head(written[:, -1])


def reparametrised() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(144, 8)),
        nn.Tanh(),
        nn.Linear(8, CLASSES),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(2, (2, 4)), nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES)
    )


def frozen_backbone() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).requires_grad_(False)
    return nn.Sequential(backbone, nn.Linear(144, CLASSES))


ZOO: list[Callable[[], nn.Module]] = [
    ConvNeXt, MobileNet, UNet, ViT, Perceiver, GraphConvolution, WaveNet, Experts, Spectral, LoRA, Splines,
    Teacher, Coupling, Recurrent, reparametrised, volumes, frozen_backbone,
]  # fmt: skip

#: The most that the numbers of a parameter may move in one step, root mean square: what moves further has exploded. One
#: batch of 32 examples again and again leaves many flat directions. The widest move is that of the
#: bias before a gate in the small MobileNet, by 7.2.
MOST_MOVED = 10.0

#: What the trust region does on its way.
AT_WORK = ("undone_steps", "shortened_steps")


class Task(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []
        self.before: dict[str, Tensor] = {}

    def training_step(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, *_: Any) -> None:
        for name, parameter in self.named_parameters():
            if name in self.before:
                moved = float((parameter.detach() - self.before[name]).abs().square().mean().sqrt())
                assert moved < MOST_MOVED, f"{name} moved by {moved:.3g} in one step"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


@pytest.mark.parametrize("make", ZOO)
def test_a_small_network_trains_with_the_defaults(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    task, callback = Task(make()), KFCCallback()
    x = torch.randn(EXAMPLES, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > 0).long() + (x[:, 0, 4:].mean((1, 2)) > 0).long()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([(x, y)] * STEPS, batch_size=None))
    assert all(map(torch.isfinite, map(torch.tensor, task.losses))), task.losses
    assert task.losses[-1] < task.losses[0], f"loss {task.losses[0]:.4g} to {task.losses[-1]:.4g}"
    events = {name: n for name, n in callback.kfc.events.state_dict().items() if name not in AT_WORK}
    assert not any(events.values()), events
    plain = {row.parameter: row.reason for row in callback.kfc.coverage() if row.treatment == "plain"}
    unused = {f"net.experts.3.{role}": NO_STATISTICS for role in ("weight", "bias")}
    expected: dict[Any, dict[str, str]] = {
        Experts: unused,
        Spectral: {"net.weight": "complex: there is no curvature for complex values"},
    }
    assert plain == expected.get(make, {})
