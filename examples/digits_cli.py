"""Train on scikit-learn's 8x8 digits from a YAML file, with KFC named there by its class path.

python examples/digits_cli.py fit --config examples/digits_cli.yaml
python examples/digits_cli.py fit --config examples/digits_cli.yaml --trainer.callbacks.damping=0.1
python examples/digits_cli.py fit --trainer.callbacks+=lightning_kfc.KFCCallback --trainer.callbacks.kl_clip=null
python examples/digits_cli.py fit --trainer.callbacks.help lightning_kfc.KFCCallback
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.functional.classification import multiclass_accuracy

import lightning_kfc  # noqa: F401 (an imported class can be named without its module: `class_path: KFCCallback`)


class Digits(LightningDataModule):
    """The 1,797 digits, a fifth of them held out.

    Args:
        batch_size: Examples in a batch.
    """

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load and split."""
        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
        data = TensorDataset(images, torch.tensor(bunch.target))
        self.train, self.held_out = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The held-out digits."""
        return DataLoader(self.held_out, self.batch_size)


class ConvNet(LightningModule):
    """Two convolutions and a Linear layer, trained by SGD with momentum.

    Args:
        lr: Learning rate.
        momentum: Momentum.
    """

    def __init__(self, lr: float = 0.5, momentum: float = 0.5) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean cross entropy."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The accuracy."""
        self.log("accuracy", multiclass_accuracy(self.net(batch[0]), batch[1], 10, average="micro"), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run the command line; see the top of this file."""
    given = list(args) if args is not None else None
    # The config given is not written out again: this example leaves no files behind.
    return LightningCLI(ConvNet, Digits, save_config_callback=None, seed_everything_default=0, args=given)


if __name__ == "__main__":
    main()
