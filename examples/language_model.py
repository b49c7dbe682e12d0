"""A byte-level transformer language model on the help texts that Python ships: KFC beside SGD and Adam.

``pydoc_data.topics`` is 460 kB of text, what ``help("for")`` shows. The model predicts every next byte, so that
each of a batch's 4,096 bytes is a loss term. The embeddings are preconditioned as well: for a table of tokens the
input factor is diagonal, how often each token occurs.

python examples/language_model.py
"""

from __future__ import annotations

import math
from functools import partial
from pydoc_data.topics import topics

import lightning as L
import torch
from _shared import QUIET, MakeOptimizer, compare, quick
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback

CONTEXT = 64
RUNS = {
    "with KFCCallback()": (partial(torch.optim.SGD, lr=0.5, momentum=0.5), [KFCCallback()]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.003), []),
}


class Block(nn.Module):
    """Causal attention and a perceptron, each on normalised inputs and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, tokens, width)``."""
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=future, need_weights=False)[0]
        return x + self.perceptron(self.norm2(x))


class LanguageModel(L.LightningModule):
    """Two blocks of width 64 over bytes; 0.14 million parameters."""

    def __init__(self, optimizer: MakeOptimizer, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """The logits of every next byte: ``(N, T)`` to ``(N, T, 256)``."""
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.bytes(text) + self.positions(places))))

    def loss(self, text: Tensor) -> Tensor:
        """Nats a byte."""
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Bits a byte on text held out: 8 is knowing nothing."""
        self.log("held-out bits a byte", self.loss(batch[0]) / math.log(2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was given."""
        return self.optimizer(self.parameters())


@torch.no_grad()
def write(model: LanguageModel, start: str, length: int = 200) -> str:
    """Go on from a start, drawing one byte after the other."""
    text = torch.tensor([list(start.encode())])
    for _ in range(length):
        probabilities = model(text[:, -CONTEXT:])[0, -1].softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    """Train with each optimizer, print the losses side by side, and let the first model write."""
    small = quick(__doc__)
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    windows = text.unfold(0, CONTEXT + 1, CONTEXT)
    # Every tenth block of 20 windows is held out: the topics differ, and some are twice in the text.
    held_out = torch.arange(len(windows)) // 20 % 10 == 9
    train_set, test_set = TensorDataset(windows[~held_out]), TensorDataset(windows[held_out])
    models = []
    epochs, batches = (1, 2) if small else (2, 1.0)

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        models.append(LanguageModel(optimizer))
        limits = {"limit_train_batches": batches, "limit_val_batches": batches}
        trainer = L.Trainer(max_epochs=epochs, val_check_interval=0.5, callbacks=callbacks, **limits, **QUIET)
        train_loader = DataLoader(train_set, 64, shuffle=True, drop_last=True)
        trainer.fit(models[-1], train_loader, DataLoader(test_set, 256))

    compare(RUNS, fit)
    print(f"\nThe first model writes:\n{write(models[0].eval(), 'The statement ', 20 if small else 300)}")


if __name__ == "__main__":
    main()
