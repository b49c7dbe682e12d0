"""Wherever factors and inverses are held, training is the same."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist

from lightning_kfc import KFCCallback
from lightning_kfc.distributed.remote import RemoteInverse
from lightning_kfc.factors.inverses import CholeskyInverse, FactorisationError
from tests.distributed.nets import EXACT, Net, branched_net, dense_net, difference, fit, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]
RARE = {"factor_every_n_steps": 2, "inverse_every_n_steps": 3, "warmup_steps": 1, "kl_clip": 1e-4}


#: No step is reviewed: a replay takes the branch that the forward took, and on half a batch that may be another one.
STEADY = {"kl_clip": 0.1}

#: Steps are reviewed, for which the ranks add up the numbers of their layers.
AUTO = {"kl_clip": "auto", "damping": "auto"}


def train(
    settings: dict[str, Any], batch_size: int, devices: int, net: Any = branched_net
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what this rank holds of each layer: names of its factors, whether its inverse, sent bytes."""
    callback, module = KFCCallback(**{**EXACT, **settings}), Net(net)
    ddp = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    trainer(callback, strategy=ddp, devices=devices).fit(module, loader(images(32), batch_size))
    weights = {name: value.detach() for name, value in module.named_parameters()}
    layers = callback.kfc.layers
    holding = {
        "factors": {name for name, layer in layers.items() if layer.factors},
        "inverses": {
            name
            for name, layer in layers.items()
            if layer.inverse is not None and not isinstance(layer.inverse, RemoteInverse)
        },
        "bytes": callback.kfc.communication,
        "trained": {name for name, layer in layers.items() if layer.inverse is not None},
    }
    return weights, holding


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
@pytest.mark.parametrize("settings", [STEADY, RARE], ids=["every step", "rare, clipped"])
def test_two_ranks_train_alike_in_every_placement(
    two_ranks: Ranks, inverse: str, placement: str, settings: dict[str, Any]
) -> None:
    own = {**settings, "inverse": inverse, "placement": placement}
    (first, held), (second, others) = two_ranks.run(train, own, 4, 2)
    assert difference(first, second) == 0
    whole = fit(Net(branched_net), data=images(32), batch_size=8, kfc={**settings, "inverse": inverse})
    found = difference(first, {name: whole[name] for name in first})
    print(f"largest relative difference: {found:.2g}")
    assert found < 1e-9
    trained = held["trained"]
    assert trained == others["trained"]
    assert len(trained) == 5
    if placement == "comm-opt":
        assert held["inverses"] == others["inverses"] == held["factors"] == trained
        assert held["bytes"].updates == 0
    else:
        assert held["inverses"] == held["factors"]
        assert held["factors"] | others["factors"] == trained
        assert not held["factors"] & others["factors"]
        # Each layer's update, and one number about it.
        numbers = sum(value.numel() for name, value in first.items() if "never" not in name) + len(trained)
        assert held["bytes"].updates == 8 * numbers


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
def test_two_ranks_review_their_steps_as_one_rank_does(two_ranks: Ranks, inverse: str, placement: str) -> None:
    own = {**AUTO, "inverse": inverse, "placement": placement}
    (first, _), (second, _) = two_ranks.run(train, own, 4, 2, dense_net)
    assert difference(first, second) == 0
    whole = fit(Net(dense_net), data=images(32), batch_size=8, kfc={**AUTO, "inverse": inverse})
    assert difference(first, {name: whole[name] for name in first}) < 1e-9


def test_four_ranks_train_alike_in_every_placement(four_ranks: Ranks) -> None:
    whole = fit(Net(branched_net), data=images(32), batch_size=8, kfc=STEADY)
    for placement, copies in (("comm-opt", 4), (0.5, 2), ("mem-opt", 1)):
        results = four_ranks.run(train, {**STEADY, "placement": placement}, 2, 4)
        first = results[0][0]
        for weights, _ in results:
            assert difference(weights, first) == 0
        found = difference(first, {name: whole[name] for name in first})
        print(f"{placement}: largest relative difference: {found:.2g}")
        assert found < 1e-9
        for name in results[0][1]["trained"]:
            assert sum(name in held["inverses"] for _, held in results) == copies
            assert sum(name in held["factors"] for _, held in results) == (4 if copies == 4 else 1)


class Spoiled(Net):
    """In the third step the new inverse of the last layer is of no use on the ranks that hold it."""

    def on_after_backward(self) -> None:
        if self.global_step == 2:
            (callback,) = (c for c in self.trainer.callbacks if isinstance(c, KFCCallback))
            layer = callback.kfc.layers["net.4"]
            if isinstance(layer.inverse, CholeskyInverse):
                layer.inverse = replace(layer.inverse, A_inverse=layer.inverse.A_inverse * math.nan)


def train_spoiled(placement: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    callback, module = KFCCallback(**EXACT, placement=placement), Spoiled()
    several = dist.is_initialized()
    ddp = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if several else {}
    made = CholeskyInverse.factorise.__func__
    failing = iter([False] * 3 + [True] + [False] * 99)

    def factorise(cls: Any, factors: Any, damping: float) -> CholeskyInverse:
        # One layer of 3 outputs, and with two ranks only one rank has it, so that the other needs a message.
        if factors["G"].shape[-1] == 3 and next(failing):
            raise FactorisationError("told to fail")
        return made(cls, factors, damping)

    CholeskyInverse.factorise = classmethod(factorise)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(callback, **ddp).fit(module, loader(images(40), 4 if several else 8))
    finally:
        CholeskyInverse.factorise = classmethod(made)
    return {name: value.detach() for name, value in module.named_parameters()}, callback.kfc.events.state_dict()


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
def test_what_goes_wrong_on_the_rank_that_holds_an_inverse_is_known_to_all(two_ranks: Ranks, placement: str) -> None:
    (first, events), (second, others) = two_ranks.run(train_spoiled, placement)
    whole, alone = train_spoiled(placement)
    assert difference(first, second) == 0
    assert events == others == alone
    assert events["restored_inverses"] == events["failed_factorisations"] == 1
    assert difference(first, whole) < 1e-9


class Reluctant(Net):
    """On the second rank its step does what cannot be replayed."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if dist.get_rank() == 1:
            torch.zeros(2).resize_(3)
        return super().training_step(batch, index)


def train_reluctant() -> tuple[dict[str, Tensor], bool]:
    callback, module = KFCCallback(**{**EXACT, **AUTO}), Reluctant()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2).fit(
            module, loader(images(32), 4)
        )
    return {name: value.detach() for name, value in module.named_parameters()}, callback.kfc.reviewer.active


def test_where_one_rank_cannot_review_its_steps_none_does(two_ranks: Ranks) -> None:
    (first, reviews), (second, others) = two_ranks.run(train_reluctant)
    assert not reviews
    assert not others
    assert difference(first, second) == 0


#: Long enough that every layer has its own turn after the warm-up, at steps without statistics too.
STAGGERED = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4, "warmup_steps": 1, "kl_clip": 1e-3}


def train_staggered(
    placement: str, inverse: str, batch_size: int, examples: int
) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Weights, and who was inverted at each step."""
    callback, module = KFCCallback(**{**EXACT, **STAGGERED}, placement=placement, inverse=inverse), Net(branched_net)
    inverted: list[list[str]] = []

    class Noted(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            layers, step = callback.kfc.layers, callback.kfc.step
            inverted.append([name for name, layer in layers.items() if layer.factorised_at == step])

    several = dist.is_initialized()
    ddp = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    options = {"strategy": ddp, "devices": 2} if several else {}
    fitted = trainer(callback, **options)
    fitted.callbacks.append(Noted())
    fitted.fit(module, loader(images(examples), batch_size))
    return {name: value.detach() for name, value in module.named_parameters()}, inverted


@pytest.mark.parametrize(
    ("placement", "inverse", "batch_size", "examples"),
    [
        ("comm-opt", "cholesky", 8, 120),
        ("mem-opt", "eigh", 8, 120),
        # With factors of full rank: in a null space the basis is arbitrary, and with it the eigenvalues.
        ("comm-opt", "ekfac", 48, 48 * 15),
    ],
)
def test_two_ranks_invert_the_same_layers_at_the_same_steps_as_one(
    two_ranks: Ranks, placement: str, inverse: str, batch_size: int, examples: int
) -> None:
    (first, inverted), (second, others) = two_ranks.run(train_staggered, placement, inverse, batch_size // 2, examples)
    whole, alone = train_staggered(placement, inverse, batch_size, examples)
    assert inverted == others == alone
    after = [names for names in inverted[1:] if names]
    assert len(after) >= 5
    assert len({tuple(names) for names in after}) > 1
    assert difference(first, second) == 0
    found = difference(first, whole)
    print(f"{placement}, {inverse}: largest relative difference: {found:.2g}")
    assert found < 1e-9
