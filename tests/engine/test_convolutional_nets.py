"""Whole nets of many kinds of convolutions and norms train under the callback, and all they have is covered."""

from __future__ import annotations

import logging

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback

pytestmark = pytest.mark.slow


class UNet3d(nn.Module):
    """Segments a volume: strided and dilated convolutions down, transposed ones up, a skip in between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv3d(1, 6, 3, padding="same"), nn.GroupNorm(2, 6), nn.ReLU(inplace=True))
        self.down = nn.Sequential(
            nn.Conv3d(6, 8, 3, stride=2, padding=1, bias=False), nn.InstanceNorm3d(8, affine=True), nn.PReLU(8)
        )
        self.bottom = nn.Sequential(nn.Conv3d(8, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose3d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.leave = nn.Conv3d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(torch.cat([x, self.up(self.bottom(self.down(x)))], 1))


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """MobileNet's block: a depthwise convolution, then one by one."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def mobile_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        separable(8, 16, 2),
        separable(16, 24, 1),
        separable(24, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class Upsampler1d(nn.Module):
    """Halves a signal's rate and brings it back, with a gate: regression."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(1, 8, 4, stride=2, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.up = nn.ConvTranspose1d(8, 1, 4, stride=2, padding=1, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.down(x).transpose(1, 2)).transpose(1, 2)
        return self.up(hidden + self.gate * torch.relu(hidden))


class Training(L.LightningModule):
    def __init__(self, net: nn.Module, squared: bool) -> None:
        super().__init__()
        self.net = net
        self.squared = squared
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        loss = F.mse_loss(z, y) if self.squared else F.cross_entropy(z, y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


def volumes() -> TensorDataset:
    """Noisy blocks of ones, for segmentation."""
    target = torch.zeros(32, 6, 6, 6, dtype=torch.long)
    for i, (a, b, c) in enumerate(torch.randint(0, 4, (32, 3)).tolist()):
        target[i, a : a + 3, b : b + 3, c : c + 3] = 1
    return TensorDataset(target.unsqueeze(1) + 0.5 * torch.randn(32, 1, 6, 6, 6), target)


def stripes() -> TensorDataset:
    """Gratings in four directions."""
    y = torch.randint(0, 4, (64,))
    at = torch.arange(12.0)
    phase = torch.stack([(torch.cos(a) * at[:, None] + torch.sin(a) * at[None]) for a in y * torch.pi / 4])
    return TensorDataset((phase + torch.rand(64, 1, 1) * 6).sin().unsqueeze(1) + 0.2 * torch.randn(64, 1, 12, 12), y)


def signals() -> TensorDataset:
    """Signals without their noise."""
    clean = (torch.arange(16.0) * torch.rand(64, 1, 1) + 6 * torch.rand(64, 1, 1)).sin()
    return TensorDataset(clean + 0.1 * torch.randn(64, 1, 16), clean)


NETS = {"3-D U-Net": (UNet3d, volumes), "MobileNet": (mobile_net, stripes), "1-D": (Upsampler1d, signals)}


@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("name", NETS)
def test_a_net_trains_under_the_callback_and_all_its_parameters_are_covered(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, examples = NETS[name]
    module = Training(make(), squared=name == "1-D")
    callback = KFCCallback(damping=0.1)
    with caplog.at_level(logging.INFO):
        trainer = L.Trainer(
            max_steps=30,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        trainer.fit(module, DataLoader(examples(), batch_size=16, shuffle=True))
    first, last = sum(module.losses[:4]) / 4, sum(module.losses[-4:]) / 4
    assert last < 0.6 * first, f"mean loss of four steps: {first:.3f} first, {last:.3f} last"
    coverage = callback.kfc.coverage()
    assert sum(row.numel for row in coverage) == sum(p.numel() for p in module.parameters())
    assert {row.treatment for row in coverage if row.parameter != "net.gate"} == {"kfc", "block"}
    assert str(coverage).splitlines()[1] in caplog.text, "the start-up report is the coverage"
    events = callback.kfc.events.state_dict()
    assert not any(events.values()), events
