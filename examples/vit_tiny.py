"""A small vision transformer on scikit-learn's 8x8 digits: attention, layer norm and position embeddings under KFC.

An image is cut into sixteen 2x2 patches. ``nn.MultiheadAttention`` gets Kronecker factors for its query, key and
value projections and its output projection, layer norm an exact 2x2 block for each unit, and the position
embedding and class token, which belong to no layer, a diagonal.

What to expect: see the table in docs/examples.md. SGD, here at the better of two learning rates, hardly leaves the
plateau at the start; Adam has the better of two as well, and starts later than KFC.

python examples/vit_tiny.py
"""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from _shared import QUIET, MakeOptimizer, compare, quick
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_kfc import KFCCallback

RUNS = {
    "with KFCCallback()": (partial(torch.optim.SGD, lr=0.5, momentum=0.5), [KFCCallback()]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.05, momentum=0.9), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.002), []),
}


class Block(nn.Module):
    """Attention and a perceptron, each on normalised inputs and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, tokens, width)``."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.perceptron(self.norm2(x))


class ViT(L.LightningModule):
    """Patches of 2x2 pixels, a class token, and three blocks of width 48."""

    def __init__(self, optimizer: MakeOptimizer, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the ten digits."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])

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
    """Train with each optimizer and print loss and accuracy side by side."""
    small = quick(__doc__)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train_set, test_set = random_split(data, [1437, 360], torch.Generator().manual_seed(0))
    epochs, batches = (1, 2) if small else (14, 1.0)

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        trainer = L.Trainer(max_epochs=epochs, limit_train_batches=batches, callbacks=callbacks, **QUIET)
        train_loader = DataLoader(train_set, 128, shuffle=True, drop_last=True)
        trainer.fit(ViT(optimizer), train_loader, DataLoader(test_set, 360))

    compare(RUNS, fit)


if __name__ == "__main__":
    main()
