"""``weight_sharing="reduce"`` where the rows of an example cancel in their sum: no factor is emptied."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe, train_step


class Attention(nn.Module):
    """Hand-written attention from one packed linear layer, or from three, and a head."""

    batch_first = True

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.qkv = nn.Linear(4, 12) if packed else nn.ModuleDict({part: nn.Linear(4, 4) for part in "qkv"})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.packed else [layer(x) for layer in self.qkv.values()]
        return self.head(F.scaled_dot_product_attention(*parts).mean(1))


class Centred(nn.Module):
    """A linear layer that enters only through what differs from its mean over positions."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return self.head((hidden - hidden.mean(1, keepdim=True)).square().mean(1))


class Signs(nn.Module):
    """The same weight on two positions whose derivatives are opposite: a comparison of two items."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x[:, :2])
        return scores[:, 0] - scores[:, 1]


def loss_of(model: nn.Module, examples: int = 8) -> Callable[[], Tensor]:
    x, y = data(examples, 5, 4), classes(examples, count=3)
    return lambda: F.cross_entropy(model(x), y)


def factors_of(model: nn.Module, layer: str, sharing: str, examples: int = 8) -> dict[str, Tensor]:
    return observe(model, loss_of(model, examples), weight_sharing=sharing).layers[layer].factors


CANCELLING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "keys": (lambda: Attention(packed=False), "qkv.k"),
    "packed attention": (lambda: Attention(packed=True), "qkv"),
    "centred": (Centred, "linear"),
    "opposite derivatives": (Signs, "score"),
}


@pytest.mark.parametrize(("make", "layer"), CANCELLING.values(), ids=CANCELLING)
def test_a_layer_whose_derivatives_cancel_over_positions_has_the_factors_of_expand(
    make: Callable[[], nn.Module], layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make().double()
    expected = factors_of(model, layer, "expand")
    with caplog.at_level(logging.INFO, "lightning_kfc"):
        kfc = engine(model, weight_sharing="reduce")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = loss_of(model)
        with kfc.capture():
            value = loss()
        kfc.update(value)
    for name, factor in kfc.layers[layer].factors.items():
        oracles.assert_equal(factor, expected[name], what=name)
    reason = "shared by 'expand': its derivatives cancel over an example's positions"
    assert {row.reason for row in kfc.coverage() if row.module == layer} == {reason}
    train_step(kfc, optimizer, loss)
    train_step(kfc, optimizer, loss)
    assert [record.message for record in caplog.records].count(f"KFC: layer {layer!r} is {reason}.") == 1


def test_inputs_that_cancel_over_positions_are_shared_by_expand() -> None:
    model = double(nn.InstanceNorm2d(2), nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    x, y = data(8, 2, 3, 3), classes(8, count=3)
    expand, reduce = (
        observe(model, lambda: F.cross_entropy(model(x), y), weight_sharing=sharing).layers["1"]
        for sharing in ("expand", "reduce")
    )
    oracles.assert_equal(reduce.A, expand.A, what="A")
    oracles.assert_equal(reduce.G, expand.G, what="G")
    assert reduce.adapter.approximation() == "shared by 'expand': its inputs cancel over an example's positions"


@pytest.mark.parametrize("layer", ["qkv.q", "qkv.v"])
def test_layers_whose_derivatives_do_not_cancel_stay_reduced(layer: str) -> None:
    model = Attention(packed=False).double()
    x, y = data(8, 5, 4), classes(8, count=3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), y), weight_sharing="reduce")
    rows = torch.cat([x.mean(1), torch.ones_like(x[:, 0, :1])], 1)
    oracles.assert_equal(kfc.layers[layer].A, rows.T @ rows / 8, what="A")
    assert kfc.layers[layer].adapter.approximation() == ""


def test_few_examples_decide_nothing() -> None:
    model = Signs().double()
    kfc = engine(model, weight_sharing="reduce")
    for examples, expected in ((2, "reduce"), (8, "expand"), (2, "expand")):
        with kfc.capture():
            loss = loss_of(model, examples)()
        kfc.update(loss)
        assert kfc.layers["score"].adapter.sharing.mode == expected


def test_updates_of_keys_are_of_the_size_of_those_of_expand() -> None:
    """Reduced, the key's factor is zero, and its update the gradient over the damping."""
    sizes = {}
    for sharing in ("expand", "reduce"):
        torch.manual_seed(0)
        model = Attention(packed=False).double()
        kfc = KFC(model, weight_sharing=sharing, fisher="exact", damping=1e-4, kl_clip=None)
        loss = loss_of(model)
        with kfc.capture():
            value = loss()
        kfc.update(value)
        value.backward()
        key = model.qkv["k"].weight
        before = key.grad.norm()
        kfc.precondition(lr=0.1)
        sizes[sharing] = float(key.grad.norm() / before)
    assert sizes["reduce"] == pytest.approx(sizes["expand"], rel=1e-9)
