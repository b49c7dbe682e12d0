"""Two processes on the CPU: the same callback, and statistics of both halves of every batch.

Under DDP each process sees its own half of a batch. The callback averages the factors over processes, as DDP
averages the gradients, so that all of them take the same step. At the end this is checked: every process must
hold the same weights and the same factors. For GPUs, set ``accelerator="gpu"`` and leave ``gloo`` out.

Lightning starts the second process by running this script again; no ``torchrun`` is needed.

python examples/ddp.py
"""

from __future__ import annotations

import time

import lightning as L
import torch
from _shared import QUIET, mnist_split, quick
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_kfc import KFCCallback


class ConvNet(L.LightningModule):
    """Two convolutions and two linear layers; nothing in it knows of KFC or of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of this process's half of the batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and accuracy on digits held out, over both processes."""
        logits = self.net(batch[0])
        self.log("loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("accuracy", multiclass_accuracy(logits, batch[1], 10, average="micro"), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Print what all processes found together."""
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.print(f"epoch {self.current_epoch + 1:2}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recommended start."""
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


def main() -> None:
    """Train on two processes, then compare what they hold."""
    small = quick(__doc__)
    L.seed_everything(0, verbose=False)
    train_images, train_labels, test_images, test_labels = mnist_split(256 if small else 4096)
    # Lightning deals the digits out to the processes: 256 for each, 512 in all.
    batch_size, epochs = (64, 1) if small else (256, 10)
    train_loader = DataLoader(TensorDataset(train_images, train_labels), batch_size, shuffle=True)
    test_loader = DataLoader(TensorDataset(test_images[:904], test_labels[:904]), 452)

    callback, model = KFCCallback(), ConvNet()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = L.Trainer(devices=2, strategy=strategy, max_epochs=epochs, callbacks=[callback], **QUIET)
    started = time.perf_counter()
    trainer.fit(model, train_loader, test_loader)
    seconds = time.perf_counter() - started

    held = [p.detach().flatten() for p in model.parameters()]
    held += [factor.flatten() for layer in callback.kfc.layers.values() for factor in (layer.A, layer.G)]
    # Shape (processes, numbers): what every process holds.
    everywhere = trainer.strategy.all_gather(torch.cat(held))
    if not (everywhere == everywhere[0]).all():
        raise SystemExit("The processes have drifted apart.")
    model.print(
        f"{trainer.global_step} steps on {trainer.world_size} processes in {seconds:.1f} s; "
        f"all hold the same {everywhere.shape[1]:,} weights and numbers of factors."
    )


if __name__ == "__main__":
    main()
