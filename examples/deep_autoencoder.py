"""The deep autoencoder of Hinton & Salakhutdinov (2006) on MNIST digits: KFC beside SGD and Adam.

Eight linear layers, 784-1000-500-250-30 and back, squeeze a digit into 30 numbers. It is the classic hard case
for gradient descent, which stays for long on a plateau where every digit is reconstructed as the average digit.

The loss is the binary cross-entropy of a digit: summed over its pixels, mean over digits. Damping and KL clip are
in units of the loss, so that a mean over pixels (784 times smaller) would need ``damping`` 784 times smaller too.

python examples/deep_autoencoder.py
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

from lightning_kfc import KFCCallback

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
#: Adam's learning rate is the best of a grid, SGD's its smallest
#: (``python -m benchmarks.contest.convergence autoencoder``).
RUNS = {
    "with KFCCallback()": (partial(torch.optim.SGD, lr=0.5, momentum=0.5), [KFCCallback()]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.01, momentum=0.9), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.002), []),
}


class Autoencoder(L.LightningModule):
    """Encoder and decoder in one chain, linear at the code and at the logits of the pixels."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(WIDTHS):
            layers += [nn.Linear(d_in, d_out)]
            if d_out not in (30, 784):
                layers += [nn.ReLU()]
        self.net = nn.Sequential(*layers)

    def loss(self, images: Tensor) -> Tensor:
        """Nats a digit."""
        pixels = images.flatten(1)
        return F.binary_cross_entropy_with_logits(self.net(pixels), pixels, reduction="sum") / len(pixels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The loss on digits held out."""
        self.log("held-out nats", self.loss(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was given."""
        return self.optimizer(self.parameters())


def main() -> None:
    """Train with each optimizer and print the held-out losses side by side."""
    small = quick(__doc__)
    train_images, _, test_images, _ = mnist_split(256 if small else 4096)
    train_set, test_set = TensorDataset(train_images), TensorDataset(test_images[:904])
    batch_size, epochs = (128, 1) if small else (512, 16)

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
        train_loader = DataLoader(train_set, batch_size, shuffle=True, drop_last=True)
        trainer.fit(Autoencoder(optimizer), train_loader, DataLoader(test_set, 904))

    compare(RUNS, fit)


if __name__ == "__main__":
    main()
