"""Skipped inverses, and those made beside the training: all ranks do the same, and it is what one rank does."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist

from lightning_kfc import KFCCallback
from lightning_kfc.inverting import Inverting
from tests.distributed.nets import EXACT, Net, difference, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.harness import QUIET

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in QUIET),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
RARE = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4, "warmup_steps": 2, "kl_clip": 1e-3}
SKIPPING = {"inverse_tolerance": 0.2}
BESIDE = {"background_inverses": True}


class Noting(KFCCallback):
    """Notes which inverses were made of which step's factors, as of each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.made = [*getattr(self, "made", []), {n: e.factorised_at for n, e in self.kfc.layers.items()}]


def train(
    settings: dict[str, Any],
    epochs: int = 4,
    path: Path | None = None,
    ckpt: Path | None = None,
    disturb: bool = False,
    batch_size: int = 8,
) -> dict[str, Any]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    several = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks} if ranks > 1 else {}
    callback, module = Noting(**{**EXACT, **RARE, **settings}), Net()
    used = trainer(callback, max_epochs=epochs, enable_checkpointing=path is not None, **several)
    if path is not None:
        used.callbacks.append(ModelCheckpoint(dirpath=path, save_last=True, save_top_k=0))
    unmoved = Inverting._unmoved
    if disturb and dist.get_rank() == 1:
        # Ranks that round differently may come to different conclusions on the threshold.
        Inverting._unmoved = lambda self, layer: not unmoved(self, layer) and layer.inverse is not None
    try:
        used.fit(
            module,
            loader(images(3 * batch_size), batch_size // ranks),
            ckpt_path=ckpt,
            weights_only=None if ckpt is None else True,
        )
    finally:
        Inverting._unmoved = unmoved
    kfc = callback.kfc
    return {
        "weights": {name: value.detach() for name, value in module.named_parameters()},
        "made": callback.made,
        "skipped": kfc.inverses_skipped,
        "origins": {n: e.origin is not None for n, e in kfc.layers.items()},
        "held": {n: bool(e.averages) for n, e in kfc.layers.items()},
        "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("lightning-kfc")],
    }


def same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
@pytest.mark.parametrize("settings", [SKIPPING, BESIDE, {**SKIPPING, **BESIDE}], ids=["skip", "beside", "both"])
@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_two_ranks_agree_and_equal_one(
    two_ranks: Ranks, placement: str, settings: dict[str, Any], inverse: str
) -> None:
    own = {**settings, "inverse": inverse}
    first, second = two_ranks.run(train, {**own, "placement": placement})
    whole = train(own)
    assert same_weights(first["weights"], second["weights"])
    assert first["made"] == second["made"] == whole["made"]
    assert first["skipped"] == second["skipped"] == whole["skipped"]
    assert (whole["skipped"] > 0) == ("inverse_tolerance" in settings)
    found = difference(first["weights"], whole["weights"])
    print(f"largest relative difference: {found:.2g}; {whole['skipped']} skipped")
    assert found < 1e-9
    for rank in (first, second):
        assert rank["threads"] == []
        # Only who has a layer's factors keeps what its inverse was made from.
        wanted = rank["held"] if "inverse_tolerance" in settings else dict.fromkeys(rank["held"], False)
        assert rank["origins"] == wanted


def test_two_ranks_equal_one_with_ekfac(two_ranks: Ranks) -> None:
    settings = {**SKIPPING, **BESIDE, "inverse": "ekfac"}
    # With factors of full rank: in a null space the basis is arbitrary, and with it the eigenvalues.
    first, second = two_ranks.run(train, settings, 4, None, None, False, 48)
    whole = train(settings, batch_size=48)
    assert same_weights(first["weights"], second["weights"])
    assert first["made"] == second["made"] == whole["made"]
    assert difference(first["weights"], whole["weights"]) < 1e-9


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
@pytest.mark.parametrize("settings", [{}, BESIDE], ids=["at once", "beside"])
def test_the_rank_that_makes_an_inverse_decides_for_all(
    two_ranks: Ranks, placement: str, settings: dict[str, Any]
) -> None:
    first, second = two_ranks.run(train, {**SKIPPING, **settings, "placement": placement}, 4, None, None, True)
    assert same_weights(first["weights"], second["weights"])
    assert first["made"] == second["made"]
    assert first["skipped"] == second["skipped"] > 0


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
def test_a_run_of_two_ranks_resumed_with_inverses_on_their_way_is_bit_for_bit_the_uninterrupted_one(
    two_ranks: Ranks, tmp_path: Path, placement: str
) -> None:
    # The first epoch ends with the last step of the warm-up, at which all inverses are due.
    settings = {**SKIPPING, **BESIDE, "placement": placement, "warmup_steps": 3}
    whole = two_ranks.run(train, settings, 4)[0]
    two_ranks.run(train, settings, 1, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["KFCCallback"]["layers"]
    assert any("coming" in layer for layer in saved.values())
    resumed = two_ranks.run(train, settings, 4, tmp_path, tmp_path / "last.ckpt")[0]
    assert difference(resumed["weights"], whole["weights"]) == 0
    assert resumed["skipped"] == whole["skipped"]
