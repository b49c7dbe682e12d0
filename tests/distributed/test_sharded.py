"""FSDP2, HSDP and tensor parallelism by ModelParallelStrategy: what several ranks hold in parts trains as on one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_kfc import KFCCallback
from lightning_kfc.distributed.sharded_tensors import whole
from tests.distributed.nets import EXACT, Net, conv_net, difference, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.distributed.sharded_nets import (
    Hybrid,
    InOnePiece,
    InTwoPieces,
    Sharded,
    TensorParallel,
    tensor_parallel_net,
)
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]
ROUNDING = 1e-9


def strategy(data: int, tensor: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(data, tensor, save_distributed_checkpoint=False, process_group_backend="gloo")


def train(
    kind: Callable[[], Net], data: int, tensor: int, kfc: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """The whole weights after training, and what this rank holds."""
    callback, module = KFCCallback(**{**EXACT, "kl_clip": 0.03, "average_weights": None, **kfc}), kind()
    options = dict(options)
    module.lr, module.momentum = options.pop("lr", module.lr), options.pop("momentum", module.momentum)
    several = {"strategy": strategy(data, tensor), "devices": data * tensor} if data * tensor > 1 else {}
    trainer(callback, **several, **options).fit(module, loader(images(24), 8 // data, tensor))
    return {
        "weights": {name: whole(value.detach()) for name, value in module.named_parameters()},
        "factors": [name for name, layer in callback.kfc.layers.items() if layer.factors],
        "treatments": {row.parameter: row.treatment for row in callback.kfc.coverage()},
        "events": str(callback.kfc.events),
    }


def plain_net() -> Net:
    return Net(conv_net)


def plain_tensor_parallel_net() -> Net:
    return Net(tensor_parallel_net)


def compare(
    ranks: Ranks,
    kind: Callable[[], Net],
    data: int,
    tensor: int,
    kfc: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The state of the ranks, whose weights must be those of one rank."""
    kfc, options = kfc or {}, options or {}
    results = ranks.run(train, kind, data, tensor, kfc, options)
    reference = plain_tensor_parallel_net if kind is TensorParallel else plain_net
    alone = {key: value for key, value in kfc.items() if key != "placement"}
    expected = train(reference, 1, 1, alone, options)["weights"]
    found = max(difference(result["weights"], expected) for result in results)
    print(f"largest relative difference: {found:.2g}")
    assert found < ROUNDING
    assert {result["events"] for result in results} == {""}
    return results


SHARDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "comm-opt": ({"placement": "comm-opt"}, {}),
    "eigh": ({"inverse": "eigh"}, {}),
    "ekfac": ({"inverse": "ekfac"}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 3}),
    "rare refreshes": ({"factor_every_n_steps": 2, "inverse_every_n_steps": 3, "warmup_steps": 1}, {}),
    "clipped": ({"kl_clip": 1e-5}, {}),
}


@pytest.mark.parametrize("option", list(SHARDED))
def test_two_ranks_that_share_a_model_equal_one_that_has_it(two_ranks: Ranks, option: str) -> None:
    kfc, options = SHARDED[option]
    first, second = compare(two_ranks, Sharded, 2, 1, kfc, options)
    layers = {"net.0", "net.2", "net.4"}
    if option in ("comm-opt", "ekfac"):
        assert set(first["factors"]) == set(second["factors"]) == layers
    else:
        # Each layer's factors are on one rank, as its parameters are shared.
        assert sorted([*first["factors"], *second["factors"]]) == sorted(layers)


def test_momentum_above_the_limit_is_removed_from_parts_of_parameters(two_ranks: Ranks) -> None:
    kfc = {"kl_clip": "auto"}
    limited, recommended = (
        two_ranks.run(train, Sharded, 2, 1, kfc, {"lr": lr, "momentum": momentum})[0]["weights"]
        for lr, momentum in ((0.04, 0.9), (0.2, 0.5))
    )
    assert difference(limited, recommended) < ROUNDING


@pytest.mark.parametrize("kind", [InOnePiece, InTwoPieces])
def test_units_of_several_layers_equal_one_rank(two_ranks: Ranks, kind: Callable[[], Net]) -> None:
    for option in ("plain", "accumulation", "rare refreshes"):
        compare(two_ranks, kind, 2, 1, *SHARDED[option])


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt", 0.5])
def test_two_replicas_of_a_model_that_two_ranks_share_equal_one_rank(four_ranks: Ranks, placement: str | float) -> None:
    compare(four_ranks, Hybrid, 4, 1, {"placement": placement})


@pytest.mark.parametrize("option", ["eigh", "ekfac", "accumulation"])
def test_two_replicas_equal_one_rank_whatever_the_option(four_ranks: Ranks, option: str) -> None:
    compare(four_ranks, Hybrid, 4, 1, *SHARDED[option])


@pytest.mark.parametrize("option", ["plain", "eigh", "ekfac", "accumulation"])
def test_column_and_row_wise_linear_layers_have_the_factors_of_the_whole_layer(two_ranks: Ranks, option: str) -> None:
    results = compare(two_ranks, TensorParallel, 1, 2, *SHARDED[option])
    assert set(results[0]["treatments"].values()) == {"kfc"}


@pytest.mark.parametrize("option", ["plain", "comm-opt", "eigh", "ekfac", "accumulation"])
def test_tensor_parallel_layers_that_are_sharded_over_the_data_parallel_ranks_too(
    four_ranks: Ranks, option: str
) -> None:
    compare(four_ranks, TensorParallel, 2, 2, *SHARDED[option])


def resume(
    kind: Callable[[], Net], data: int, tensor: int, folder: Path, epochs: int, ckpt: Path | None
) -> dict[str, Tensor]:
    settings = {
        **EXACT,
        "kl_clip": 0.03,
        "average_weights": None,
        "factor_every_n_steps": 2,
        "inverse_every_n_steps": 4,
    }
    callback, module = KFCCallback(**settings), kind()
    saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0)
    several = {"strategy": strategy(data, tensor), "devices": data * tensor} if data * tensor > 1 else {}
    used = trainer(callback, enable_checkpointing=True, max_epochs=epochs, **several)
    used.callbacks.append(saver)
    loaded = {"ckpt_path": ckpt, "weights_only": False} if ckpt is not None else {}
    used.fit(module, loader(images(24), 8 // data, tensor), **loaded)
    return {name: whole(value.detach()) for name, value in module.named_parameters()}


MESHES = {
    "FSDP2": (Sharded, 2, 1),
    "HSDP": (Hybrid, 4, 1),
    "TP": (TensorParallel, 1, 2),
    "FSDP2 + TP": (TensorParallel, 2, 2),
}


def ranks_of(mesh: str, request: pytest.FixtureRequest) -> Ranks:
    _, data, tensor = MESHES[mesh]
    ranks: Ranks = request.getfixturevalue("two_ranks" if data * tensor == 2 else "four_ranks")
    return ranks


@pytest.mark.parametrize("mesh", list(MESHES))
def test_a_shared_model_goes_on_from_its_checkpoint_bit_for_bit(
    mesh: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ranks = ranks_of(mesh, request)
    expected = ranks.run(resume, *MESHES[mesh], tmp_path / "whole", 2, None)[0]
    ranks.run(resume, *MESHES[mesh], tmp_path / "part", 1, None)
    found = ranks.run(resume, *MESHES[mesh], tmp_path / "part", 2, tmp_path / "part" / "last.ckpt")[0]
    assert difference(found, expected) == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("legs", [("FSDP2", "HSDP", "FSDP2"), ("TP", "FSDP2 + TP", "TP")], ids=" to ".join)
def test_a_shared_model_goes_on_with_another_number_of_ranks(
    legs: Sequence[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ckpt = None
    for epochs, mesh in enumerate(legs, 1):
        folder = tmp_path / str(epochs)
        found = ranks_of(mesh, request).run(resume, *MESHES[mesh], folder, epochs, ckpt)[0]
        ckpt = folder / "last.ckpt"
    alone = plain_tensor_parallel_net if "TP" in legs else plain_net
    expected = resume(alone, 1, 1, tmp_path / "alone", len(legs), None)
    difference_found = difference(found, expected)
    print(f"largest relative difference: {difference_found:.2g}")
    assert difference_found < ROUNDING


def spoilt(kind: Callable[[], Net], data: int, tensor: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    examples = images(24)
    examples.tensors[0][9] = torch.nan
    callback, module = KFCCallback(**{**EXACT, "kl_clip": 0.03, "average_weights": None}), kind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, strategy=strategy(data, tensor), devices=data * tensor).fit(
            module, loader(examples, 8 // data, tensor)
        )
    return {name: whole(p.detach()) for name, p in module.named_parameters()}, callback.kfc.events.state_dict()


@pytest.mark.parametrize("mesh", list(MESHES))
def test_a_nan_in_one_rank_s_part_skips_the_step_on_all(mesh: str, request: pytest.FixtureRequest) -> None:
    results = ranks_of(mesh, request).run(spoilt, *MESHES[mesh])
    first, events = results[0]
    assert events["nonfinite_gradients"] == 1
    for weights, others in results:
        assert events == others
        assert difference(weights, first) == 0
    assert all(bool(torch.isfinite(value).all()) for value in first.values())
