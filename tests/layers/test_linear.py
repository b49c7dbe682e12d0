"""Linear and its relatives: bilinear, transposed, wrapped; where the examples lie under "reduce"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.layers import linear
from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, observe, train_step
from tests.layers.rows import curved, dense_fisher, gradients, rebuilt_gradient


class Pair(nn.Module):
    """A Bilinear on two inputs, given by position or by name."""

    def __init__(self, layer: nn.Bilinear, inputs: tuple[Tensor, Tensor], *, by_name: bool = False) -> None:
        super().__init__()
        self.layer, self.inputs, self.by_name = layer, inputs, by_name

    def forward(self) -> Tensor:
        first, second = self.inputs
        return self.layer(first, input2=second) if self.by_name else self.layer(first, second)


def bilinear_matrix(tensors: Any) -> Tensor:
    return oracles.joint_matrix(tensors["layer.weight"], tensors.get("layer.bias"))


@given(
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    by_name=st.booleans(),
)
def test_rows_of_a_bilinear_rebuild_its_gradient(
    leading: list[int], sizes: tuple[int, int, int], bias: bool, by_name: bool
) -> None:
    inputs = (data(*leading, sizes[0]), data(*leading, sizes[1], seed=2))
    model = Pair(nn.Bilinear(*sizes, bias=bias).double(), inputs, by_name=by_name)

    def loss() -> Tensor:
        return curved(model())

    expected = bilinear_matrix(gradients(model, loss))
    oracles.assert_equal(rebuilt_gradient(engine(model), "layer", loss), expected, what="gradient")


@pytest.mark.parametrize("examples", [1, 4])
def test_a_bilinear_with_squared_error_is_exact(examples: int) -> None:
    model = Pair(nn.Bilinear(2, 3, 2).double(), (data(examples, 2), data(examples, 3, seed=2)))
    y = data(examples, 2, seed=3)
    layer = observe(model, lambda: F.mse_loss(model(), y)).layers["layer"]
    expected = dense_fisher(model, model, lambda z: F.mse_loss(z, y), bilinear_matrix)
    oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what="A⊗G")


def test_a_bilinear_of_very_many_pairs_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGEST_PRODUCT", 5)
    model = nn.ModuleList([Pair(nn.Bilinear(2, 3, 2), (torch.ones(1, 2), torch.ones(1, 3))), nn.Linear(2, 2)])
    (row, *_) = engine(model).coverage()
    assert (row.treatment, row.reason) == ("diagonal", "its A would be 6 x 6")


def conv1d(features: int, inputs: int) -> nn.Module:
    """Hugging Face's transposed Linear."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="an optional package")
    return pytorch_utils.Conv1D(features, inputs).double()


@pytest.mark.parametrize("leading", [(4,), (2, 3)])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_rows_of_a_transposed_linear_rebuild_its_gradient(leading: tuple[int, ...], frozen: str | None) -> None:
    model = nn.Sequential(conv1d(3, 2))
    if frozen is not None:
        model[0].get_parameter(frozen).requires_grad_(False)
    x = data(*leading, 2)

    def loss() -> Tensor:
        return curved(model(x))

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    weight = found.get("0.weight")
    expected = oracles.joint_matrix(None if weight is None else weight.T, found.get("0.bias"))
    oracles.assert_equal(rebuilt_gradient(engine(model), "0", loss), expected, what="gradient")


def test_a_transposed_linear_gets_the_transpose_of_the_linear_s_update() -> None:
    plain, transposed = nn.Sequential(nn.Linear(2, 3)).double(), nn.Sequential(conv1d(3, 2))
    with torch.no_grad():
        transposed[0].weight.copy_(plain[0].weight.T)
        transposed[0].bias.copy_(plain[0].bias)
    x, y = data(5, 2), classes(5, count=3)
    updates = []
    for model in (plain, transposed):
        kfc = observe(model, lambda model=model: F.cross_entropy(model(x), y))
        F.cross_entropy(model(x), y).backward()
        kfc.precondition(lr=0.1)
        updates.append((model[0].weight.grad, model[0].bias.grad))
    oracles.assert_equal(updates[1][0], updates[0][0].T, what="weight's update")
    oracles.assert_equal(updates[1][1], updates[0][1], what="bias's update")


class LowRank(nn.Module):
    """A LoRA-style wrapped Linear: the frozen layer plus the product of two small ones."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def test_a_low_rank_adapted_linear_trains_only_its_two_factors() -> None:
    model = nn.Sequential(LowRank(nn.Linear(4, 4), 2), nn.Tanh(), LowRank(nn.Linear(4, 3), 2))
    x, y = torch.randn(32, 4), classes(32, count=3)
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    frozen = model[0].base.weight.clone()
    losses = [train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), y)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model[0].base.weight, frozen)
    treatments = {row.parameter: row.treatment for row in kfc.coverage()}
    assert {t for name, t in treatments.items() if "base" in name} == {"frozen"}
    assert {t for name, t in treatments.items() if "base" not in name} == {"kfc"}


class SequenceFirst(nn.Module):
    """A user's own module on (sequence, batch, features), with or without torch's ``batch_first``."""

    def __init__(self, batch_first: bool | None) -> None:
        super().__init__()
        if batch_first is not None:
            self.batch_first = batch_first
        self.body = nn.Sequential(nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize(("batch_first", "axis"), [(None, 0), (True, 0), (False, 1)])
def test_reduce_takes_the_examples_axis_from_the_nearest_batch_first(batch_first: bool | None, axis: int) -> None:
    model = nn.ModuleDict({"part": SequenceFirst(batch_first)}).double()
    x = data(3, 5, 3) if axis == 0 else data(3, 5, 3).transpose(0, 1)  # three examples
    y = torch.zeros(*x.shape[:2], 2).double()
    kfc = observe(model, lambda: F.mse_loss(model["part"](x), y), weight_sharing="reduce", fisher="mc")
    rows = torch.cat([x.mean(1 - axis), torch.ones(3, 1).double()], 1)
    oracles.assert_equal(kfc.layers["part.body.0"].A, rows.T @ rows / 3, what="A")


class OverSequence(nn.Module):
    """A Linear on (sequence, batch, features), then a mean or a sum over the sequence."""

    batch_first = False

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(3, 2), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.mean(0) if self.how == "mean" else y.sum(0)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_a_linear_then_a_mean_or_sum_over_a_leading_sequence_is_exact_with_reduce(how: str) -> None:
    model = OverSequence(how).double()
    x, y = data(5, 4, 3), data(4, 2, seed=2)
    layer = observe(model, lambda: F.mse_loss(model(x), y), weight_sharing="reduce").layers["linear"]
    expected = oracles.dense_fisher(model, x, lambda z: F.mse_loss(z, y), "linear")
    oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what="A⊗G")
