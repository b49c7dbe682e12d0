"""Regression on the Auto MPG data that mlxtend ships: the mean squared error is a Gaussian likelihood.

How many miles do 392 cars of the years 1970 to 1982 go on a gallon of fuel, given cylinders, displacement, power,
weight, acceleration, year and origin? For a squared error the Fisher matrix is the Gauss-Newton matrix, so that a
step with KFC is close to that of a Levenberg-Marquardt fit.

What to expect: the training error falls faster than with SGD or Adam (docs/examples.md), and the held-out score does
not gain by it: on so few cars, a net that fits them all soon predicts worse. Stop early. The score of a linear
regression is printed for comparison.

python examples/regression.py
"""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from _shared import QUIET, MakeOptimizer, compare, quick
from lightning.pytorch.callbacks import Callback
from mlxtend.data import autompg_data
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback

RUNS = {
    "with KFCCallback()": (partial(torch.optim.SGD, lr=0.5, momentum=0.5), [KFCCallback()]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.03), []),
}


def cars() -> tuple[TensorDataset, TensorDataset]:
    """Three quarters of the cars to train on, one held out; standardised, origin as one of three."""
    features, miles = (torch.tensor(part, dtype=torch.float32) for part in autompg_data())
    origin = F.one_hot(features[:, 6].long() - 1, 3)
    x, y = torch.cat([features[:, :6], origin], dim=1), miles.unsqueeze(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:294], order[294:]
    # By what is known in training. Layers and damping expect inputs of about one.
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


class Regression(L.LightningModule):
    """Two hidden layers of 32 units."""

    def __init__(self, optimizer: MakeOptimizer, train_set: TensorDataset) -> None:
        super().__init__()
        self.optimizer, self.train_set = optimizer, train_set
        self.net = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error."""
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The error on the cars trained on, and the share of variance explained for those held out."""
        inputs, targets = self.train_set.tensors
        self.log("training error", F.mse_loss(self.net(inputs), targets))
        self.log("held-out R2", 1 - F.mse_loss(self.net(batch[0]), batch[1]) / batch[1].var(correction=0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was given."""
        return self.optimizer(self.parameters())


def main() -> None:
    """Train with each optimizer, and fit a linear regression for comparison."""
    small = quick(__doc__)
    train_set, test_set = cars()

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        trainer = L.Trainer(max_epochs=2 if small else 40, log_every_n_steps=1, callbacks=callbacks, **QUIET)
        # All cars in one batch.
        trainer.fit(Regression(optimizer, train_set), DataLoader(train_set, 294), DataLoader(test_set, 98))

    compare(RUNS, fit)
    linear = LinearRegression().fit(*train_set.tensors).score(*test_set.tensors)
    print(f"Linear regression, held-out R2: {linear:.4f}")


if __name__ == "__main__":
    main()
