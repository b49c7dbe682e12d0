"""The three inverses under a real Trainer, and over two ranks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback
from lightning_kfc.factors.inverse import INVERSES
from tests import oracles
from tests.nets import classes, data, engine, small_conv_net


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = small_conv_net().float()
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
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


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*the current time.*")
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


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _values(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The corrected eigenvalues after two steps of which only the first refreshes the basis."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_conv_net()
    kfc = engine(model, inverse="ekfac", inverse_every_n_steps=4, warmup_steps=0, max_factor_dim=20)
    for step in range(2):
        with kfc.capture():
            loss = F.cross_entropy(model((1 + step) * x), y)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)
    assert all(isinstance(layer.inverse, INVERSES["ekfac"]) for layer in kfc.layers.values())
    return {name: layer.inverse.state()["values"] for name, layer in kfc.layers.items()}  # type: ignore[misc, union-attr]


def _rank(rank: int, port: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    torch.save(_values(data(4, 2, 6, 6)[half], classes(4, count=3)[half]), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_a_batch_each_have_the_eigenvalues_of_one_with_the_whole(tmp_path: Path) -> None:
    whole = _values(data(4, 2, 6, 6), classes(4, count=3))
    mp.spawn(_rank, (_port(), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, expected in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), "ranks must step alike"
        oracles.assert_equal(ranks[0][name], expected, rtol=1e-8, what=f"eigenvalues of {name}")
