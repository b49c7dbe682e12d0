"""Skipped inverses: all ranks skip the same, and it is what one rank skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist

from lightning_kfc import KFCCallback
from lightning_kfc.inverting import Inverting
from tests.distributed.nets import EXACT, Net, difference, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.harness import QUIET

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
RARE = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4, "warmup_steps": 2, "kl_clip": 1e-3}
SKIPPING = {"inverse_tolerance": 0.2}


class Noting(KFCCallback):
    """Notes which inverses were made of which step's factors, as of each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.made = [*getattr(self, "made", []), {n: e.factorised_at for n, e in self.kfc.layers.items()}]


def train(
    settings: dict[str, Any],
    epochs: int = 4,
    disturb: bool = False,
    batch_size: int = 8,
) -> dict[str, Any]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    several = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks} if ranks > 1 else {}
    callback, module = Noting(**{**EXACT, **RARE, **settings}), Net()
    used = trainer(callback, max_epochs=epochs, **several)
    unmoved = Inverting._unmoved
    if disturb and dist.get_rank() == 1:
        # Ranks that round differently may come to different conclusions on the threshold.
        Inverting._unmoved = lambda self, layer, now: not unmoved(self, layer, now) and layer.inverse is not None
    try:
        used.fit(module, loader(images(3 * batch_size), batch_size // ranks))
    finally:
        Inverting._unmoved = unmoved
    kfc = callback.kfc
    return {
        "weights": {name: value.detach() for name, value in module.named_parameters()},
        "made": callback.made,
        "skipped": kfc.inverses_skipped,
        "origins": {n: e.origin is not None for n, e in kfc.layers.items()},
        "held": {n: bool(e.averages) for n, e in kfc.layers.items()},
    }


def same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_two_ranks_agree_and_equal_one(two_ranks: Ranks, placement: str, inverse: str) -> None:
    own = {**SKIPPING, "inverse": inverse}
    first, second = two_ranks.run(train, {**own, "placement": placement})
    whole = train(own)
    assert same_weights(first["weights"], second["weights"])
    assert first["made"] == second["made"] == whole["made"]
    assert first["skipped"] == second["skipped"] == whole["skipped"] > 0
    found = difference(first["weights"], whole["weights"])
    print(f"largest relative difference: {found:.2g}; {whole['skipped']} skipped")
    assert found < 1e-9
    for rank in (first, second):
        # Only who has a layer's factors keeps what its inverse was made from.
        assert rank["origins"] == rank["held"]


def test_two_ranks_equal_one_with_ekfac(two_ranks: Ranks) -> None:
    settings = {**SKIPPING, "inverse": "ekfac"}
    # With factors of full rank: in a null space the basis is arbitrary, and with it the eigenvalues.
    first, second = two_ranks.run(train, settings, 4, False, 48)
    whole = train(settings, batch_size=48)
    assert same_weights(first["weights"], second["weights"])
    assert first["made"] == second["made"] == whole["made"]
    assert difference(first["weights"], whole["weights"]) < 1e-9


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
def test_the_rank_that_makes_an_inverse_decides_for_all(two_ranks: Ranks, placement: str) -> None:
    first, second = two_ranks.run(train, {**SKIPPING, "placement": placement}, 4, True)
    assert same_weights(first["weights"], second["weights"])
    assert first["made"] == second["made"]
    assert first["skipped"] == second["skipped"] > 0
