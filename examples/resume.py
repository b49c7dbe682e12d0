"""Resume from a checkpoint: the resumed run is the uninterrupted one, bit for bit.

The callback's factors, inverses and step are part of every checkpoint that the Trainer writes, and
``fit(ckpt_path=...)`` loads them; nothing is to be done for it. Three runs of equal length end with the same
weights or not:

1. one that is never interrupted;
2. one that is stopped half-way and resumed by new objects, as a new process would;
3. the same with ``KFCCallback(save_factors=False)``, whose checkpoints are small. It estimates the curvature anew,
   so that its weights differ: as good a run, but another one.

python examples/resume.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning as L
import torch
from _shared import QUIET, quick
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_kfc import KFCCallback


class ConvNet(L.LightningModule):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The accuracy on digits held out."""
        self.log("accuracy", multiclass_accuracy(self.net(batch[0]), batch[1], 10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recommended start; its momentum is in the checkpoint, as ever."""
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


def train(epochs: int, checkpoint: Path | None = None, save_factors: bool = True) -> L.Trainer:
    """Train to an epoch, from the start or from a checkpoint."""
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train_set, test_set = random_split(data, [1437, 360], torch.Generator().manual_seed(0))
    # The order of an epoch depends on its number alone (Lightning calls set_epoch), and not on how many came before
    # it in this process: a plain shuffle=True would go on with another order than the uninterrupted run has.
    order = DistributedSampler(train_set, num_replicas=1, rank=0, seed=0)
    callback = KFCCallback(save_factors=save_factors)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], log_every_n_steps=5, **QUIET)
    trainer.fit(ConvNet(), DataLoader(train_set, 128, sampler=order), DataLoader(test_set, 360), ckpt_path=checkpoint)
    return trainer


def stop_and_resume(epochs: int, folder: Path, save_factors: bool) -> tuple[L.Trainer, int]:
    """Train half of the epochs, write a checkpoint, and go on from it; also the bytes of the checkpoint."""
    checkpoint = folder / f"half-way-{save_factors}.ckpt"
    train(epochs // 2, save_factors=save_factors).save_checkpoint(checkpoint)
    return train(epochs, checkpoint, save_factors), checkpoint.stat().st_size


def main() -> None:
    """Run all three, and fail if the second is not the first."""
    epochs = 2 if quick(__doc__) else 12
    with tempfile.TemporaryDirectory() as folder:
        whole = train(epochs)
        resumed, size = stop_and_resume(epochs, Path(folder), save_factors=True)
        anew, small_size = stop_and_resume(epochs, Path(folder), save_factors=False)

    print(f"\n{'run':<34}{'accuracy':>9}{'checkpoint':>12}{'largest difference of a weight':>32}")
    runs = {"uninterrupted": (whole, None), "resumed": (resumed, size)}
    runs["resumed, save_factors=False"] = (anew, small_size)
    for name, (trainer, bytes_) in runs.items():
        pairs = zip(trainer.lightning_module.parameters(), whole.lightning_module.parameters(), strict=True)
        difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
        shown = "-" if bytes_ is None else f"{bytes_ / 1e6:.2f} MB"
        print(f"{name:<34}{float(trainer.callback_metrics['accuracy']):>9.4f}{shown:>12}{difference:>32.3g}")
        if trainer is resumed and difference > 0:
            raise SystemExit("The resumed run is not the uninterrupted one.")


if __name__ == "__main__":
    main()
