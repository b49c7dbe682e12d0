"""Training with a strategy that starts its own processes; each of them saves what it ends with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from lightning_kfc import KFCCallback
from tests.distributed.nets import EXACT, Net, images, outcome, trainer


class Saving(Net):
    """Saves weights, factors and inverses when training ends, wherever that is, and reads the data in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def train_dataloader(self) -> DataLoader:
        data = images(24)
        return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))

    def on_train_end(self) -> None:
        (callback,) = (c for c in self.trainer.callbacks if isinstance(c, KFCCallback))
        torch.save(outcome(self, callback), self.folder / f"{dist.get_rank()}.pt")


def train(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer(KFCCallback(**EXACT), strategy=strategy, devices=2).fit(Saving(folder))
