"""Data of the tasks away from home: seeded generators, scikit-learn's photographs and digits, Python's docstrings."""

from __future__ import annotations

import ast
import functools
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest.data import CONTEXT, UNKNOWN_BYTE, Split

#: Held-out examples, taken from the end.
HELD_OUT = 512
#: Packages of the standard library whose docstrings are read.
PACKAGES = ("asyncio", "concurrent/futures", "email", "http", "importlib", "logging", "multiprocessing", "unittest")


def split_off(inputs: Tensor, targets: Tensor, held_out: int = HELD_OUT) -> Split:
    """The last examples held out."""
    return Split(inputs[:-held_out], targets[:-held_out], inputs[-held_out:], targets[-held_out:])


def standardised(columns: Tensor) -> Tensor:
    """Each column with mean 0 and standard deviation 1."""
    return (columns - columns.mean(0)) / columns.std(0)


@functools.cache
def waveforms(count: int = 4096 + HELD_OUT, length: int = 64) -> Split:
    """Noisy waves of eight kinds, shape ``(N, 1, length)``, and their kind."""
    generator = torch.Generator().manual_seed(11)
    kind = torch.randint(8, (count,), generator=generator)
    cycles, phase, height = (torch.rand(count, 1, generator=generator) for _ in range(3))
    time = torch.linspace(0, 1, length)
    angle = (2 + 5 * cycles) * time + phase
    turn = angle % 1
    sine = torch.sin(2 * math.pi * angle)
    shapes = [
        sine,
        sine.sign(),
        2 * turn - 1,
        4 * (turn - 0.5).abs() - 1,
        torch.sin(2 * math.pi * angle * (0.5 + time)),
        sine * torch.exp(-4 * time),
        sine * (torch.sin(2 * math.pi * time) > 0),
        (turn < 0.15).float(),
    ]
    clean = torch.stack(shapes)[kind, torch.arange(count)]
    drift = torch.randn(count, length, generator=generator).cumsum(1) / 8
    noise = 0.4 * torch.randn(count, length, generator=generator)
    return split_off(((0.5 + height) * clean + drift + noise)[:, None], kind)


def photographs() -> tuple[Tensor, Tensor]:
    """scikit-learn's two photographs (a temple, a flower), 3 channels in [0, 1], at half their height and width."""
    from sklearn.datasets import load_sample_images

    temple, flower = (torch.tensor(photo).permute(2, 0, 1)[None].float() / 255 for photo in load_sample_images().images)
    return F.avg_pool2d(temple, 2)[0], F.avg_pool2d(flower, 2)[0]


def patches(photo: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Square patches from anywhere, shape ``(count, channels, size, size)``."""
    tops = torch.randint(photo.shape[1] - size + 1, (count,), generator=generator)
    lefts = torch.randint(photo.shape[2] - size + 1, (count,), generator=generator)
    rows, columns = tops[:, None] + torch.arange(size), lefts[:, None] + torch.arange(size)
    return photo[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


@functools.cache
def turned_patches(count: int = 4096 + HELD_OUT, size: int = 16) -> Split:
    """Patches of the two photographs, turned by a multiple of 90 degrees; classes are photograph and angle."""
    generator = torch.Generator().manual_seed(12)
    kind = torch.randint(8, (count,), generator=generator)
    both = torch.stack([patches(photo, count, size, generator) for photo in photographs()])
    chosen = both[kind % 2, torch.arange(count)]
    turned = torch.stack([chosen.rot90(k, (2, 3)) for k in range(4)])[kind // 2, torch.arange(count)]
    mean, deviation = turned.mean((0, 2, 3), keepdim=True), turned.std((0, 2, 3), keepdim=True)
    return split_off((turned - mean) / deviation, kind)


@functools.cache
def docstrings() -> Split:
    """Docstrings of the standard library as windows of bytes, and the same windows one byte later."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in (path for package in PACKAGES for path in sorted((library / package).glob("*.py"))):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        texts += [ast.get_docstring(node) or "" for node in documented]
    read = torch.tensor(list("\n".join(texts).encode())).clamp(max=UNKNOWN_BYTE)
    length = (len(read) - 1) // CONTEXT * CONTEXT
    order = torch.randperm(length // CONTEXT, generator=torch.Generator().manual_seed(13))
    return split_off(read[:length].reshape(-1, CONTEXT)[order], read[1 : length + 1].reshape(-1, CONTEXT)[order])


@functools.cache
def prices(count: int = 16384 + HELD_OUT, width: int = 24) -> Split:
    """A table for regression: columns with long tails and of two kinds, kinks, products, noise; all standardised."""
    generator = torch.Generator().manual_seed(14)
    columns = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator) / 4
    columns[:, :6] = columns[:, :6].exp()
    columns[:, 18:] = (columns[:, 18:] > 0.3).float()
    x = standardised(columns)
    wavy = torch.sin(3 * x[:, 6]) + torch.sin(2 * x[:, 7] * x[:, 8])
    steps = (x[:, 9] > x[:, 10]).float() * x[:, 11] + x[:, 18] * x[:, 12] + 0.5 * x[:, 19] * x[:, 20]
    hidden = torch.tanh(x @ torch.randn(width, 8, generator=generator) / 3) @ torch.randn(8, generator=generator)
    noise = 0.3 * torch.randn(count, generator=generator)
    y = wavy + steps + hidden + 0.5 * x[:, 0].clamp(max=3) + (x[:, 13] - 0.5).relu() ** 1.5 + noise
    return split_off(x, standardised(y[:, None]))


@functools.cache
def customers(count: int = 16384 + HELD_OUT, width: int = 32, kinds: int = 7) -> Split:
    """A table for classification: rare kinds, groups of related columns, columns of noise; standardised."""
    generator = torch.Generator().manual_seed(15)
    centres = 0.9 * torch.randn(kinds, 3, 12, generator=generator)
    kind = torch.multinomial(0.7 ** torch.arange(kinds).float(), count, replacement=True, generator=generator)
    which = torch.randint(3, (count,), generator=generator)
    causes = centres[kind, which] + torch.randn(count, 12, generator=generator)
    mixed = causes @ torch.randn(12, width, generator=generator)
    mixed = torch.cat([mixed[:, :20] + 0.3 * mixed[:, :20].abs() ** 1.5, mixed[:, 20:24].round()], 1)
    noise = torch.randn(count, width - 24, generator=generator).exp()
    return split_off(standardised(torch.cat([mixed, noise], 1)), kind)


@functools.cache
def coloured_coordinates() -> Split:
    """Coordinates in the temple's photograph, in [-1, 1], and their colours, 3 channels in [0, 1]."""
    photo = F.avg_pool2d(photographs()[0], 2)[:, :100, :150]
    height, width = photo.shape[1:]
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(16))
    return split_off(torch.stack([rows, columns], -1).reshape(-1, 2)[order], photo.flatten(1).T[order])


@functools.cache
def blurred_patches(count: int = 4096 + HELD_OUT, size: int = 16) -> Split:
    """Grey patches of the temple at half their size and with noise, and the patches themselves."""
    generator = torch.Generator().manual_seed(17)
    sharp = patches(photographs()[0].mean(0, keepdim=True), count, size, generator) - 0.5
    small = F.avg_pool2d(sharp, 2)
    return split_off(small + 0.05 * torch.randn(small.shape, generator=generator), sharp)


@functools.cache
def noisy_patches(count: int = 8192 + HELD_OUT, size: int = 12) -> Split:
    """Flower patches mixed with noise: 3 channels and one with the share of noise; targets are the noise.

    The mixture is that of the cosine schedule of Nichol & Dhariwal 2021, arXiv:2102.09672: sines and cosines.
    """
    generator = torch.Generator().manual_seed(18)
    clean = 4 * patches(photographs()[1], count, size, generator) - 2
    share = torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    mixed = torch.cos(share * math.pi / 2) * clean + torch.sin(share * math.pi / 2) * noise
    return split_off(torch.cat([mixed, share.expand(-1, 1, size, size)], 1), noise)


@functools.cache
def drawn_shapes(count: int = 2048 + HELD_OUT, size: int = 20) -> Split:
    """A disc, a rectangle and a ring over a noisy ground, each in front of the one before; pixels of four kinds."""
    generator = torch.Generator().manual_seed(19)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = F.interpolate(torch.randn(count, 3, 6, 6, generator=generator), size=(size, size), mode="bilinear")
    kinds = torch.zeros(count, size, size, dtype=torch.long)
    for kind in (1, 2, 3):
        centre = size * torch.rand(2, count, 1, 1, generator=generator)
        extent = size * (0.12 + 0.18 * torch.rand(2, count, 1, 1, generator=generator))
        down, across = rows - centre[0], columns - centre[1]
        distance = (down**2 + across**2).sqrt()
        inside = (
            distance < extent[0],
            (down.abs() < extent[0]) & (across.abs() < extent[1]),
            (distance < extent[0]) & (distance > extent[0] / 2),
        )[kind - 1]
        colour = torch.randn(count, 3, 1, 1, generator=generator)
        image = torch.where(inside[:, None], colour + 0.3 * image, image)
        kinds[inside] = kind
    return split_off(image + 0.3 * torch.randn(image.shape, generator=generator), kinds)


@functools.cache
def digits_with_draws(latent: int) -> Split:
    """scikit-learn's 1,797 digits, 64 pixels in [0, 1] followed by normal draws for the code; pixels as targets."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(20)
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    pixels = pixels[torch.randperm(len(pixels), generator=generator)]
    draws = torch.randn(len(pixels), latent, generator=generator)
    return split_off(torch.cat([pixels, draws], 1), pixels, held_out=261)


@functools.cache
def series(count: int = 4096 + HELD_OUT, past: int = 48, future: int = 8) -> Split:
    """Series with a season, a trend and autocorrelated noise: ``past`` values, and ``future`` ones as targets."""
    generator = torch.Generator().manual_seed(21)
    time = torch.arange(past + future)
    period = 6 + 12 * torch.rand(count, 1, generator=generator)
    phase, trend = torch.rand(count, 1, generator=generator), torch.randn(count, 1, generator=generator) / 20
    angle = 2 * math.pi * (time / period + phase)
    values = torch.sin(angle) + 0.5 * torch.sin(2 * angle + 6 * phase) + trend * (time - past)
    noise = torch.zeros(count)
    for step in range(past + future):
        noise = 0.7 * noise + 0.15 * torch.randn(count, generator=generator)
        values[:, step] += noise
    return split_off(values[:, :past], values[:, past:])


@functools.cache
def pairs_of_crops(count: int = 8192 + HELD_OUT, size: int = 8) -> Split:
    """Two crops of a patch of the flower with different brightness and noise, shape ``(N, 2, 3, 8, 8)``.

    Targets are the examples' numbers, which the loss does not need: both crops of a patch belong together.
    """
    generator = torch.Generator().manual_seed(22)
    large = patches(photographs()[1], count, size + 6, generator)
    crops = []
    for _ in range(2):
        offsets = torch.randint(7, (2, count, 1), generator=generator) + torch.arange(size)
        examples, channels = torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None]
        crop = large[examples, channels, offsets[0][:, None, :, None], offsets[1][:, None, None, :]]
        brightness = 0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
        crops.append(4 * brightness * crop - 2 + 0.1 * torch.randn(crop.shape, generator=generator))
    return split_off(torch.stack(crops, 1), torch.arange(count))
