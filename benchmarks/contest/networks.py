"""Networks of the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

#: Widths of the deep autoencoder (Hinton & Salakhutdinov 2006).
AUTOENCODER_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def conv_net() -> nn.Sequential:
    """Two 5x5 convolutions with pooling, then two linear layers; 54,314 parameters; the net of ``make demo``."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def deep_autoencoder() -> nn.Sequential:
    """784-1000-500-250-30-250-500-1000-784 with ReLU between, and a linear code; PyTorch's own initialisation."""
    layers: list[nn.Module] = []
    for position, (d_in, d_out) in enumerate(itertools.pairwise(AUTOENCODER_WIDTHS)):
        layers.append(nn.Linear(d_in, d_out))
        if position not in (3, 7):  # the code, and the logits
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def convolutional_autoencoder() -> nn.Sequential:
    """Two strided 3x3 convolutions to a linear code of 32, two transposed 4x4 ones back; 54,425 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 32),
        nn.Linear(32, 16 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (16, 7, 7)),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016, fig. 2).

    The shortcut of a block that halves the image and widens the channels takes every second pixel and pads
    channels with zeros (option A): it has no parameters.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.stride, self.widening = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, c_in, H, W)`` to ``(N, c_out, H / stride, W / stride)``."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.widening:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.widening))
        return F.relu(residual + shortcut)


def resnet20(classes: int = 10, width: int = 16) -> nn.Sequential:
    """ResNet-20 for 3-channel images (He et al. 2016, sec. 4.2); at its width of 16, 0.27 million parameters.

    Args:
        classes: Outputs.
        width: Channels of the first stage; the second has twice as many, the third four times.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in (width, 2 * width, 4 * width):
        for position in range(3):
            layers.append(BasicBlock(channels, stage, stride=2 if position == 0 and stage > width else 1))
            channels = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm, four times as wide at the end (He et al. 2016, fig. 5).

    The stride is the 3x3 convolution's. Where the shape changes, the shortcut is a 1x1 convolution with batch norm.
    """

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != 4 * width:
            self.shortcut.append(nn.Conv2d(c_in, 4 * width, 1, stride, bias=False)).append(nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, c_in, H, W)`` to ``(N, 4 width, H / stride, W / stride)``."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 1000, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)) -> nn.Sequential:
    """ResNet-50 for 3-channel images (He et al. 2016, table 1); at its width of 64, 25.6 million parameters.

    Args:
        classes: Outputs.
        width: Channels of the first stage's 3x3 convolutions; each later stage has twice as many as the one before.
        blocks: Of each stage.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for position in range(count):
            layers.append(Bottleneck(channels, inner, stride=2 if position == 0 and stage > 0 else 1))
            channels = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
