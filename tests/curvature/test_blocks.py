"""A wide linear layer's larger factor in equal diagonal blocks, where a whole one would cost too much."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_kfc import KFC
from lightning_kfc.curvature.find_layers import find_layers
from lightning_kfc.factors import cost
from lightning_kfc.factors.cost import (
    CHEAP,
    MOST_IN_THE_MEAN,
    SMALLEST_BLOCK,
    cost_in_the_mean,
    number_of_blocks,
)
from lightning_kfc.factors.inverses.cholesky import CholeskyInverse
from lightning_kfc.layers import Forward
from lightning_kfc.layers.blocks import BlocksAdapter
from lightning_kfc.layers.linear import LinearAdapter
from lightning_kfc.settings import Settings
from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, engine, observe, train_step

BLOCKS = 3


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layers of a few units be too wide."""

    def blocks(d_in: int, d_out: int, rows: int, every: tuple[int, int]) -> int:
        return BLOCKS if max(d_in, d_out) > 5 else 1

    monkeypatch.setattr("lightning_kfc.layers.expensive_factors.number_of_blocks", blocks)


def blocks_of(factor: Tensor) -> Tensor:
    """The equal blocks on the diagonal of a matrix, filled up with zeros at its end."""
    size = -(-len(factor) // BLOCKS)
    missing = BLOCKS * size - len(factor)
    whole = F.pad(factor, (0, missing, 0, missing))
    return torch.stack([whole[i : i + size, i : i + size] for i in range(0, BLOCKS * size, size)])


#: Inputs, outputs, bias, and the side that is cut.
WIDE = [
    (6, 2, False, "A"),
    (7, 2, True, "A"),
    (8, 2, True, "A"),
    (2, 6, True, "G"),
    (2, 7, True, "G"),
    (7, 7, False, "A"),
]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("d_in", "d_out", "bias", "side"), WIDE)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_the_factors_are_blocks_of_the_whole_one_and_the_other_side_s_own(
    d_in: int, d_out: int, bias: bool, side: str, weight_sharing: str
) -> None:
    layer, x = nn.Linear(d_in, d_out, bias=bias).double(), data(5, 2, d_in)

    def loss() -> Tensor:
        return F.mse_loss(layer(x), torch.zeros_like(layer(x)))

    whole = observe(layer, loss, weight_sharing=weight_sharing, max_factor_dim=None).layers[""]
    found = observe(layer, loss, weight_sharing=weight_sharing).layers[""]
    assert isinstance(found.adapter, BlocksAdapter)
    for name in ("A", "G"):
        expected = blocks_of(getattr(whole, name)) if name == side else whole.factors[name].repeat(BLOCKS, 1, 1)
        oracles.assert_equal(found.factors[name], expected, what=name)
        assert tuple(found.factors[name].shape) == found.adapter.factor_shapes()[name]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("d_in", "d_out", "bias", "side"), WIDE)
def test_the_step_is_the_dense_solve_of_each_block(d_in: int, d_out: int, bias: bool, side: str) -> None:
    layer, x, damping = nn.Linear(d_in, d_out, bias=bias).double(), data(9, d_in), 0.03
    kfc = engine(layer, damping=damping)
    with kfc.capture():
        loss = F.mse_loss(layer(x), torch.ones(9, d_out).double())
    kfc.update(loss)
    loss.backward()
    gradient = oracles.joint_matrix(layer.weight.grad, layer.bias.grad if bias else None)
    axis = 1 if side == "A" else 0
    parts = gradient.split(-(-gradient.shape[axis] // BLOCKS), dim=axis)
    A, G = kfc.layers[""].A, kfc.layers[""].G
    solved = []
    for part, a, g in zip(parts, A, G, strict=True):
        # What fills a block up has no gradient, and no part in the others.
        filled = F.pad(part, (0, len(a) - part.shape[1], 0, len(g) - part.shape[0]))
        solved.append(oracles.dense_solve(*oracles.pi_damped(a, g, damping), filled)[: part.shape[0], : part.shape[1]])
    kfc.precondition(lr=0.1)
    found = oracles.joint_matrix(layer.weight.grad, layer.bias.grad if bias else None)
    oracles.assert_equal(found, torch.cat(solved, axis), what="V")


@pytest.mark.slow
@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, {"inverse": "ekfac"}, {"rule": "adam"}], ids=str)
def test_it_trains_by_every_inverse_and_rule_and_from_its_state(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = data(20, 7), classes(20, count=3)
    kfc = engine(net, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(kfc: KFC) -> float:
        return float(train_step(kfc, optimizer, lambda: F.cross_entropy(net(x), y)))

    losses = [step(kfc) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert not any(kfc.events.state_dict().values())
    state, weights = kfc.state_dict(), {name: value.clone() for name, value in net.state_dict().items()}
    expected = [step(kfc) for _ in range(3)]
    resumed = engine(net, **options)
    assert resumed.load_state_dict(state) == []
    net.load_state_dict(weights)
    assert [step(resumed) for _ in range(3)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(6, 2, batch_first=True), lambda: nn.LSTM(2, 4)])
def test_parts_of_a_weight_are_cut_like_whole_ones(make: Any) -> None:
    module = make().double()
    x = data(4, 3, 6) if isinstance(module, nn.MultiheadAttention) else data(3, 4, 2)

    def loss() -> Tensor:
        out = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)[0]
        return F.mse_loss(out, torch.zeros_like(out))

    # The self-test compares the gradient that rows rebuild with autograd's, and raises where they differ.
    kfc = observe(module, loss)
    assert any(isinstance(layer.adapter, BlocksAdapter) for layer in kfc.layers.values())


@pytest.mark.usefixtures("cut")
def test_a_weight_that_is_frozen_for_a_time_is_cut_when_it_is_trained() -> None:
    layer, x, y = nn.Linear(7, 2).double(), data(9, 7), classes(9, count=2)
    layer.weight.requires_grad_(False)
    kfc = engine(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    train_step(kfc, optimizer, lambda: F.cross_entropy(layer(x), y))
    assert kfc.layers[""].adapter.factor_shapes() == {"A": (1, 1, 1), "G": (1, 2, 2)}
    layer.weight.requires_grad_(True)
    train_step(kfc, optimizer, lambda: F.cross_entropy(layer(x), y))
    assert kfc.layers[""].adapter.factor_shapes() == {"A": (3, 3, 3), "G": (3, 2, 2)}
    assert kfc.layers[""].inverse is not None


def test_the_coverage_states_what_was_chosen_and_why() -> None:
    kfc = KFC(nn.Sequential(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10)))
    row = next(row for row in kfc.coverage() if row.parameter == "1.weight")
    assert row.factor_shapes == {"A": (4, 2305, 2305), "G": (4, 128, 128)}
    assert row.reason == "A in 4 blocks: one would cost 70 x the layer's forward and backward"
    shown = str(kfc.coverage())
    assert "1,179,776  4 x (A 2,305, G 128)" in shown
    assert "Other factors (A in 4 blocks: one would cost 70 x the layer's forward" in shown


def test_a_wide_convolution_has_the_diagonal_instead() -> None:
    found = find_layers(nn.Conv2d(512, 1, 4), Settings()).layers[""]
    assert found.adapter.factor_shapes() == {"A": (1, 8193), "G": (1, 1, 1)}
    assert found.adapter.approximation().startswith("A diagonal: a dense one would cost")


def test_no_bound_on_the_size_is_none_on_the_cost() -> None:
    found = find_layers(nn.Linear(9216, 128), Settings(max_factor_dim=None)).layers[""]
    assert found.adapter.factor_shapes() == {"A": (1, 9217, 9217), "G": (1, 128, 128)}


def test_shorter_periods_cut_earlier() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        return find_layers(nn.Linear(4096, 64), Settings(**options)).layers[""].adapter.factor_shapes()

    assert shapes()["A"] == (1, 4097, 4097)
    assert shapes(factor_every_n_steps=1, inverse_every_n_steps=1)["A"][0] > 1


@given(
    d_in=st.integers(1, 10_000),
    d_out=st.integers(1, 10_000),
    rows=st.sampled_from([128, 1024]),
    every=st.sampled_from([(10, 20), (1, 1), (50, 200)]),
)
def test_no_pair_costs_more_than_the_stated_multiple_or_what_is_cheap(
    d_in: int, d_out: int, rows: int, every: tuple[int, int]
) -> None:
    blocks = number_of_blocks(d_in, d_out, rows, every)
    cost, own = cost_in_the_mean(d_in, d_out, rows, every, blocks)
    if max(d_in, d_out) > SMALLEST_BLOCK * blocks:
        assert cost <= max(CHEAP, MOST_IN_THE_MEAN * own)
    if blocks > 1:
        cost, own = cost_in_the_mean(d_in, d_out, rows, every, blocks // 2)
        assert cost > max(CHEAP, MOST_IN_THE_MEAN * own)


@contextlib.contextmanager
def small_bounds() -> Iterator[None]:
    """Bounds for layers that are a hundredth as large, so that their work can be done and counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "CHEAP", 1e6)
        patch.setattr(cost, "SMALLEST_BLOCK", 32)
        number_of_blocks.cache_clear()
        yield
    number_of_blocks.cache_clear()


#: What torch does not count itself, in floating-point operations (Golub & Van Loan, Matrix Computations, 4.2, 5.2).
FACTORISATIONS = {
    torch.ops.aten.linalg_cholesky_ex: lambda shape, *_, **__: math.prod(shape[:-1]) * shape[-1] ** 2 // 3,
    torch.ops.aten.cholesky_inverse: lambda shape, *_, **__: math.prod(shape[:-1]) * shape[-1] ** 2 * 2 // 3,
    torch.ops.aten.linalg_qr: lambda shape, *_, **__: 4 * math.prod(shape) * shape[-1],
}


def multiply_adds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and the multiply-adds that it took, counted while it is done."""
    with FlopCounterMode(display=False, custom_mapping=FACTORISATIONS) as counter:
        done = work()
    return done, counter.get_total_flops() / 2


def own_and_added(layer: nn.Linear, rows: int, every: tuple[int, int]) -> tuple[float, float]:
    """What a layer takes in a step, and what its pair of factors adds in the mean."""
    options = Settings(factor_every_n_steps=every[0], inverse_every_n_steps=every[1])
    adapter = find_layers(layer, options).layers[""].adapter
    x = torch.randn(rows, layer.in_features, requires_grad=True)

    def forward_and_backward() -> Tensor:
        output = layer(x)
        output.backward(torch.ones_like(output))
        return output.detach()

    output, own = multiply_adds(forward_and_backward)
    with torch.no_grad():
        record = adapter.record(Forward((x.detach(),), {}, output))
        _, of_input = multiply_adds(lambda: adapter.record(Forward((x.detach(),), {}, output)))
        found, both = multiply_adds(lambda: adapter.statistics(record, torch.randn(rows, layer.out_features)))
        inverse, refresh = multiply_adds(lambda: CholeskyInverse.factorise(found.factors(), 0.01))
        gradient = adapter.matrix({"weight": layer.weight.grad})
        _, solve = multiply_adds(lambda: inverse.for_low_rank(rows).solve(gradient))
    return own, (of_input + both) / every[0] + refresh / every[1] + solve


@examples(60)
@example(d_in=300, d_out=16, rows=128, every=(1, 1))
@example(d_in=4, d_out=900, rows=128, every=(1, 1))
@example(d_in=900, d_out=2, rows=128, every=(10, 20))
@given(
    d_in=st.integers(1, 32) | st.integers(1, 900),
    d_out=st.integers(1, 32) | st.integers(1, 900),
    rows=st.sampled_from([8, 64, 128]),
    every=st.sampled_from([(10, 20), (1, 1), (50, 200)]),
)
def test_the_counted_operations_keep_to_the_stated_bound(
    d_in: int, d_out: int, rows: int, every: tuple[int, int]
) -> None:
    """With fewer rows than are reckoned with, too: 16 times what the layer takes with those, or what is cheap."""
    with small_bounds():
        blocks = number_of_blocks(d_in, d_out, LinearAdapter.usual_rows, every)
        own, added = own_and_added(nn.Linear(d_in, d_out, bias=False), rows, every)
        bound = max(cost.CHEAP, MOST_IN_THE_MEAN * own * LinearAdapter.usual_rows / rows)
        if max(d_in, d_out) > cost.SMALLEST_BLOCK * blocks:
            assert added <= bound, f"{added:.3g} multiply-adds, {added / own:.1f} x the layer's own, bound {bound:.3g}"
