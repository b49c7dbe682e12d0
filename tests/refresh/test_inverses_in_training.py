"""The three inverses under a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback
from lightning_kfc.factors.inverses import INVERSES
from tests.helpers.nets import data, small_conv_net


def quiet(test: Any) -> Any:
    """Without Lightning's own messages about so small a Trainer."""
    for line in (
        r"ignore:The '\w+_dataloader' does not have many workers",
        "ignore:Checkpoint directory .* exists and is not empty",
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        test = pytest.mark.filterwarnings(line)(test)
    return test


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = small_conv_net().float()
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


def loader() -> DataLoader[Any]:
    x = data(32, 2, 6, 6).float()
    return DataLoader(TensorDataset(x, (x.sum((1, 2, 3)) > 0).long()), batch_size=8)


def trainer(path: Path, callbacks: list[Any], epochs: int, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=path,
        callbacks=callbacks,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_the_callback_names_every_inverse_for_its_command_line() -> None:
    assert set(get_args(get_type_hints(KFCCallback.__init__)["inverse"])) == set(INVERSES)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("inverse", list(INVERSES))
def test_training_falls_and_resumes_bit_for_bit(inverse: str, tmp_path: Path) -> None:
    def callback() -> KFCCallback:
        # Periods that end neither together nor with an epoch's 2 steps.
        options: dict[str, Any] = {"factor_every_n_steps": 2, "inverse_every_n_steps": 3, "warmup_steps": 1}
        return KFCCallback(inverse=inverse, max_factor_dim=20, damping=0.05, **options)

    def run(path: Path, epochs: int, **fit: Any) -> Net:
        model = Net()
        saver = ModelCheckpoint(dirpath=path, save_last=True, save_top_k=0)
        trainer(path, [callback(), saver], epochs, accumulate_grad_batches=2).fit(model, loader(), **fit)
        return model

    whole = run(tmp_path / "whole", 8)
    assert sum(whole.losses[-4:]) < 0.8 * sum(whole.losses[:4])
    run(tmp_path / "part", 3)
    resumed = run(tmp_path / "part", 8, ckpt_path=tmp_path / "part" / "last.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
