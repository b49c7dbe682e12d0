"""ResNet-20 with batch normalization on MNIST digits: convolutions, norm layers and shortcuts under KFC.

He et al. 2016 (sec. 4.2), on digits that are pooled to 14x14 so that a run takes seconds. The convolutions get
Kronecker factors; the scale and shift of every BatchNorm get an exact 2x2 block for each channel. Nothing is to
be set for that: the table printed at the start shows it.

What to expect: see the table in docs/examples.md. SGD has the better of two learning rates.

python examples/resnet20.py
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import lightning as L
import torch
from _shared import QUIET, MakeOptimizer, compare, mnist_split, quick
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_kfc import KFCCallback

RUNS = {
    "with KFCCallback()": (partial(torch.optim.SGD, lr=0.5, momentum=0.5), [KFCCallback()]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.03, momentum=0.9), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.005), []),
}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which pads channels with zeros where they widen."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.stride, self.widening = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, c_in, H, W)`` to ``(N, c_out, H / stride, W / stride)``."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.widening))
        return F.relu(residual + shortcut)


class ResNet20(L.LightningModule):
    """Three stages of three blocks, 16, 32 and 64 channels wide: 0.27 million parameters."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the ten digits."""
        return self.head(self.blocks(self.stem(images)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and accuracy on digits held out."""
        logits = self(batch[0])
        self.log("held-out loss", F.cross_entropy(logits, batch[1]))
        self.log("accuracy", multiclass_accuracy(logits, batch[1], 10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was given."""
        return self.optimizer(self.parameters())


def main() -> None:
    """Train with and without the callback."""
    small = quick(__doc__)
    train_images, train_labels, test_images, test_labels = mnist_split(128 if small else 2048)
    train_set = TensorDataset(F.avg_pool2d(train_images, 2), train_labels)
    test_set = TensorDataset(F.avg_pool2d(test_images[:904], 2), test_labels[:904])
    batch_size, epochs = (64, 1) if small else (128, 6)

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
        train_loader = DataLoader(train_set, batch_size, shuffle=True, drop_last=True)
        trainer.fit(ResNet20(optimizer), train_loader, DataLoader(test_set, 904))

    compare(RUNS, fit)


if __name__ == "__main__":
    main()
