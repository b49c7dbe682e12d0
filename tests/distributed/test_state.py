"""Checkpoints: whichever ranks hold the factors, the saved state is whole, and any number of ranks goes on with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from lightning_kfc import KFC, KFCCallback
from lightning_kfc.distributed.remote import RemoteInverse
from tests.distributed.nets import EXACT, Net, difference, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]
#: Periods that end neither together nor with an epoch's 3 steps.
RARE = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4, "warmup_steps": 1}


class Loaded(KFCCallback):
    """Keeps the state that it starts training with, on the rank that has it all."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.started_with = self.kfc.state_dict()


def train(path: Path, settings: dict[str, Any], epochs: int, ckpt: Path | None) -> dict[str, Any]:
    """Train from the start, or on from a checkpoint; a step always sees the same 8 examples."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    several = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks} if ranks > 1 else {}
    callback, module = Loaded(**{**EXACT, **RARE, **settings}), Net()
    saver = ModelCheckpoint(dirpath=path, save_last=True, save_top_k=0)
    used = trainer(callback, enable_checkpointing=True, max_epochs=epochs, **several)
    used.callbacks.append(saver)
    used.fit(module, loader(images(24), 8 // ranks), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return {
        "weights": {name: value.detach() for name, value in module.named_parameters()},
        "started_with": callback.started_with,
        "held": [n for n, e in callback.kfc.layers.items() if e.inverse and not isinstance(e.inverse, RemoteInverse)],
    }


def factors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Factors and inverses of a state by name."""
    found = {}
    for name, layer in state["layers"].items():
        found |= {f"{name}.{key}": entry["triangle"] for key, entry in layer["factors"].items()}
        found |= {f"{name}.{key}": value for key, value in layer["inverse"].items() if isinstance(value, Tensor)}
    return found


def on(ranks: Ranks | None, *arguments: Any) -> dict[str, Any]:
    return train(*arguments) if ranks is None else ranks.run(train, *arguments)[0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt", 0.5])
def test_a_run_goes_on_with_identical_factors_on_four_two_one_and_two_ranks(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, placement: str | float
) -> None:
    settings = {"placement": placement}
    ckpt = None
    for leg, ranks in enumerate((four_ranks, two_ranks, None, two_ranks), 1):
        result = on(ranks, tmp_path / str(leg), settings, leg, ckpt)
        if ckpt is not None:
            saved = torch.load(ckpt, weights_only=True)["callbacks"]["KFCCallback"]
            assert len(factors(saved)) == 12
            assert difference(factors(result["started_with"]), factors(saved)) == 0
        ckpt = tmp_path / str(leg) / "last.ckpt"
    whole = on(None, tmp_path / "whole", {}, 4, None)
    found = difference(result["weights"], whole["weights"])
    print(f"largest relative difference: {found:.2g}")
    assert found < 1e-9


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_a_resumed_run_of_two_ranks_is_the_uninterrupted_one_bit_for_bit(
    two_ranks: Ranks, tmp_path: Path, inverse: str
) -> None:
    settings = {"placement": "mem-opt", "inverse": inverse}
    whole = on(two_ranks, tmp_path / "whole", settings, 3, None)
    on(two_ranks, tmp_path / "part", settings, 1, None)
    resumed = on(two_ranks, tmp_path / "part", settings, 3, tmp_path / "part" / "last.ckpt")
    assert difference(resumed["weights"], whole["weights"]) == 0
    assert 0 < len(resumed["held"]) < 3


def fit_twice(placement: str) -> dict[str, Tensor]:
    callback, module = KFCCallback(**{**EXACT, **RARE, "placement": placement}), Net()
    for _ in range(2):
        ddp = DDPStrategy(process_group_backend="gloo")
        trainer(callback, strategy=ddp, devices=2).fit(module, loader(images(24), 4))
    return {name: value.detach() for name, value in module.named_parameters()}


def test_a_second_fit_goes_on_from_what_each_rank_holds(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(fit_twice, "mem-opt")
    assert difference(first, second) == 0
    assert difference(first, two_ranks.run(fit_twice, "comm-opt")[0]) < 1e-9


def stated_and_saved(placement: str | float) -> tuple[int, int]:
    """The bytes that a rank stated before the first step, and those that its state takes after some."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(250, 300), torch.nn.Tanh(), torch.nn.Linear(300, 200))
    kfc = KFC(model, placement=placement)
    stated = sum(row.bytes for row in kfc.coverage())
    for _ in range(3):
        with kfc.capture():
            loss = F.cross_entropy(model(torch.randn(16, 250)), torch.randint(0, 9, (16,)))
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.01)
    with io.BytesIO() as file:
        torch.save(kfc.state_dict(), file)
        return stated, file.tell()


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt", 0.5])
def test_the_saved_state_takes_the_bytes_that_were_stated_wherever_layers_are_held(
    two_ranks: Ranks, placement: str | float
) -> None:
    # The first rank's state is the one that is saved.
    stated, saved = two_ranks.run(stated_and_saved, placement)[0]
    assert saved == pytest.approx(stated, rel=0.01)
