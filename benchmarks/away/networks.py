"""Networks of the tasks away from home, as small as their families allow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest.attention_networks import Block


def signal_net(kinds: int = 8) -> nn.Sequential:
    """Three 1-D convolutions with strides between, then a linear layer, for signals of length 64."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv1d(16, 24, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(24, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8, kinds),
    )


def _separable(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU(),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


def separable_net(kinds: int = 8) -> nn.Sequential:
    """A convolution and three depthwise-separable ones, batch norm after each, dropout (MobileNet's blocks)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _separable(16, 32, 1),
        _separable(32, 48, 2),
        _separable(48, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, kinds),
    )


class RecurrentModel(nn.Module):
    """Embedding, one GRU and a linear layer: a language model over bytes."""

    def __init__(self, vocabulary: int = 128, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 32)
        self.gru = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape ``(N, S)`` of integers to ``(N, S, vocabulary)``."""
        return self.head(self.gru(self.tokens(tokens))[0])


def table_net(columns: int, outputs: int, widths: tuple[int, ...], norm: bool = False) -> nn.Sequential:
    """Linear layers with GELU between, with or without layer norm."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(columns, width), *([nn.LayerNorm(width)] if norm else []), nn.GELU()]
        columns = width
    return nn.Sequential(*layers, nn.Linear(columns, outputs))


class SineFeatures(nn.Module):
    """Sines and cosines of fixed random directions (Tancik et al. 2020, arXiv:2006.10739)."""

    directions: Tensor

    def __init__(self, count: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("directions", scale * torch.randn(2, count))

    def forward(self, places: Tensor) -> Tensor:
        """Shape ``(N, 2)`` to ``(N, 2 count)``."""
        angles = math.pi * places @ self.directions
        return torch.cat([angles.sin(), angles.cos()], 1)


def picture_net() -> nn.Sequential:
    """Coordinates to colours: sine features, three linear layers of width 64."""
    return nn.Sequential(
        SineFeatures(48, scale=3.0),
        nn.Linear(96, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
    )


def sharpening_net(width: int = 24) -> nn.Sequential:
    """Grey images to twice their size: three convolutions and a pixel shuffle (Shi et al. 2016, arXiv:1609.05158)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(width, 4, 3, padding=1),
        nn.PixelShuffle(2),
    )


class _Residual(nn.Module):
    """Two convolutions, each after group norm and SiLU, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class NoiseUNet(nn.Module):
    """Predicts the noise in images of 3 channels, given a fourth channel with its share; one lower level."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.begin = nn.Conv2d(4, width, 3, padding=1)
        self.above = _Residual(width, width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.below = _Residual(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined = _Residual(2 * width, width)
        self.norm, self.end = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, 4, H, W)`` to ``(N, 3, H, W)``."""
        fine = self.above(self.begin(x))
        coarse = self.up(self.below(self.down(fine)))
        return self.end(F.silu(self.norm(self.joined(torch.cat([fine, coarse], 1)))))


class SegmentationNet(nn.Module):
    """Convolutions with batch norm down to a quarter of the size and back up, with one bridge; logits by pixel."""

    def __init__(self, kinds: int = 4, width: int = 8) -> None:
        super().__init__()
        self.fine = self._step(nn.Conv2d(3, width, 3, padding=1, bias=False))
        self.down = nn.Sequential(
            self._step(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)),
            self._step(nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1, bias=False)),
            self._step(nn.Conv2d(3 * width, 3 * width, 3, padding=1, bias=False)),
        )
        self.up = nn.Sequential(
            self._step(nn.ConvTranspose2d(3 * width, 2 * width, 2, stride=2, bias=False)),
            self._step(nn.ConvTranspose2d(2 * width, width, 2, stride=2, bias=False)),
        )
        self.joined = self._step(nn.Conv2d(2 * width, width, 3, padding=1, bias=False))
        self.head = nn.Conv2d(width, kinds, 1)

    @staticmethod
    def _step(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
        return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Shape ``(N, 3, H, W)`` to ``(N, kinds, H, W)``; height and width are multiples of 4."""
        fine = self.fine(images)
        return self.head(self.joined(torch.cat([fine, self.up(self.down(fine))], 1)))


class VariationalAutoencoder(nn.Module):
    """Pixels to a normal distribution of codes and back; the normal draws come with the pixels."""

    def __init__(self, pixels: int = 64, width: int = 128, latent: int = 8) -> None:
        super().__init__()
        self.pixels = pixels
        self.encoder = table_net(pixels, 2 * latent, (width, width))
        self.decoder = table_net(latent, pixels, (width, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shape ``(N, pixels + latent)`` to logits ``(N, pixels)``, means and log variances ``(N, latent)``."""
        mean, log_variance = self.encoder(x[:, : self.pixels]).chunk(2, 1)
        code = mean + (log_variance / 2).exp() * x[:, self.pixels :]
        return self.decoder(code), mean, log_variance


class Forecaster(nn.Module):
    """A transformer over pieces of six values; the last piece's output is the forecast."""

    def __init__(self, past: int = 48, future: int = 8, width: int = 32, depth: int = 2, piece: int = 6) -> None:
        super().__init__()
        self.piece = piece
        self.pieces = nn.Linear(piece, width)
        self.positions = nn.Parameter(0.02 * torch.randn(past // piece, width))
        self.blocks = nn.Sequential(*[Block(width, 4, causal=False) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, future)

    def forward(self, values: Tensor) -> Tensor:
        """Shape ``(N, past)`` to ``(N, future)``."""
        x = self.pieces(values.unflatten(1, (-1, self.piece))) + self.positions
        return self.head(self.norm(self.blocks(x)[:, -1]))


class PairEncoder(nn.Module):
    """Encodes both images of a pair by one network of two convolutions and two linear layers."""

    def __init__(self, code: int = 24) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, code),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """Shape ``(N, 2, 3, 8, 8)`` to ``(N, 2, code)``."""
        return self.encoder(pairs.flatten(0, 1)).unflatten(0, (-1, 2))
