"""A GAN on scikit-learn's 8x8 digits: manual optimization with two optimizers under one KFCCallback.

Each network is preconditioned with the statistics of its own optimizer's loss. Nothing is to be set for that, but
each loss must go through ``self.manual_backward``: a bare ``loss.backward()`` cannot be seen by callbacks.

The learning rate is 0.1 without momentum, and not the recommended start: of two networks that chase each other
neither should take long steps. It was chosen on this run.

The result is measured by a Frechet distance, as the usual FID is, but between pixels: normal distributions are
fitted to generated and to held-out digits, and compared. Two halves of the real digits show the best to be hoped for.

python examples/gan.py
"""

from __future__ import annotations

from functools import partial

import lightning as L
import numpy as np
import scipy.linalg
import torch
from _shared import QUIET, MakeOptimizer, compare, quick
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_kfc import KFCCallback

NOISE = 32
RUNS = {
    "with KFCCallback()": (partial(torch.optim.SGD, lr=0.1, momentum=0.0), [KFCCallback()]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.3, momentum=0.5), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.003, betas=(0.5, 0.999)), []),
}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the normal distributions fitted to two sets of images."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    root = np.trace(scipy.linalg.sqrtm(a.T.cov().numpy() @ b.T.cov().numpy()).real)
    return float((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()) - 2 * float(root)


class GAN(L.LightningModule):
    """A generator and a discriminator, each with its own optimizer."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer = optimizer
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Linear(64, 128), nn.LeakyReLU(0.2)),
            *(nn.Linear(128, 128), nn.LeakyReLU(0.2)),
            nn.Linear(128, 1),
        )

    def generate(self, count: int) -> Tensor:
        """New digits, shape ``(count, 64)``."""
        return self.generator(torch.randn(count, NOISE, device=self.device))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """One step of the discriminator, then one of the generator."""
        real = batch[0].flatten(1)
        optimizer_d, optimizer_g = self.optimizers()

        fake = self.generate(len(real)).detach()
        judged_real, judged_fake = self.discriminator(real), self.discriminator(fake)
        # Real digits are labelled 0.9 and not 1, lest the discriminator grow too sure.
        loss = F.binary_cross_entropy_with_logits(judged_real, torch.full_like(judged_real, 0.9))
        loss = loss + F.binary_cross_entropy_with_logits(judged_fake, torch.zeros_like(judged_fake))
        optimizer_d.zero_grad()
        self.manual_backward(loss)
        optimizer_d.step()

        self.toggle_optimizer(optimizer_g)
        judged_fake = self.discriminator(self.generate(len(real)))
        loss = F.binary_cross_entropy_with_logits(judged_fake, torch.ones_like(judged_fake))
        optimizer_g.zero_grad()
        self.manual_backward(loss)
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """How far generated digits are from those held out."""
        self.log("Frechet distance", frechet_distance(self.generate(2000), batch[0]))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each network."""
        return [self.optimizer(self.discriminator.parameters()), self.optimizer(self.generator.parameters())]


def picture(images: Tensor) -> str:
    """Digits in a row, in characters."""
    rows = (images.clamp(0, 0.99) * 5).long().unbind(1)
    return "\n".join("  ".join("".join(" .+#@"[p] * 2 for p in line) for line in row.tolist()) for row in rows)


def main() -> None:
    """Train with each optimizer, print the distances side by side, and show digits of the first generator."""
    small = quick(__doc__)
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    train_set, test_set = random_split(TensorDataset(images), [1437, 360], torch.Generator().manual_seed(0))
    every, epochs, batches = (1, 1, 2) if small else (10, 60, 1.0)
    models = []

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        models.append(GAN(optimizer))
        options = {"check_val_every_n_epoch": every, "limit_train_batches": batches, **QUIET}
        trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **options)
        train_loader = DataLoader(train_set, 128, shuffle=True, drop_last=True)
        trainer.fit(models[-1], train_loader, DataLoader(test_set, 360))

    compare(RUNS, fit)
    real = frechet_distance(images[train_set.indices], images[test_set.indices])
    print(f"Frechet distance of real digits: {real:.4f}")
    with torch.no_grad():
        print(f"\nDigits by the first generator:\n{picture(models[0].generate(6).unflatten(1, (8, 8)))}")


if __name__ == "__main__":
    main()
