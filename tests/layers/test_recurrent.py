"""Recurrent modules: the products of their gates, exactly, from a recurrence that agrees with the fused one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from tests import oracles
from tests.layers.rows import curved, dense_fisher, gradients, rebuilt_gradient
from tests.nets import classes, data, engine, observe, train_step

FEATURES, HIDDEN = 3, 2


class Recur(nn.Module):
    """A recurrent module on one input; all that it returns, as one vector."""

    def __init__(self, rnn: nn.Module, *inputs: Any) -> None:
        super().__init__()
        self.rnn, self.inputs = rnn, inputs

    def forward(self) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in flat(self.rnn(*self.inputs))])


def flat(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [] if value is None else [tensor for part in value for tensor in flat(part)]


@st.composite
def recurrent(draw: st.DrawFn) -> Recur:
    """Any recurrent module over sequences, and an input that fits it."""
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if options["num_layers"] > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.4]))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.sampled_from([0, 1]))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    rnn = kind(FEATURES, HIDDEN, **options).double().train(draw(st.booleans()))
    layout = draw(st.sampled_from(["padded", "packed", "unbatched"]))
    length, examples = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    leading = (examples, length) if options["batch_first"] else (length, examples)
    x: Any = data(*((length,) if layout == "unbatched" else leading), FEATURES)
    if layout == "packed":
        lengths = [draw(st.integers(1, length)) for _ in range(examples)]
        x = pack_padded_sequence(x, torch.tensor(lengths), batch_first=options["batch_first"], enforce_sorted=False)
    if not draw(st.booleans()):
        return Recur(rnn, x)
    states = options["num_layers"] * (1 + options["bidirectional"])
    batch = () if layout == "unbatched" else (examples,)
    h = data(states, *batch, options.get("proj_size", 0) or HIDDEN, seed=3)
    return Recur(rnn, x, (h, data(states, *batch, HIDDEN, seed=4)) if kind is nn.LSTM else h)


def matrix_of(part: str) -> Any:
    return lambda tensors: oracles.joint_matrix(tensors[f"rnn.weight_{part}"], tensors.get(f"rnn.bias_{part}"))


@settings(max_examples=60)
@given(model=recurrent())
def test_rows_of_every_product_rebuild_its_gradient(model: Recur) -> None:
    kfc = engine(model)

    def loss() -> Tensor:
        torch.manual_seed(3)  # the dropout between layers
        return curved(model())

    expected = gradients(model, loss)
    assert {f"rnn.weight_{name.split('.')[1]}" for name in kfc.layers} == {n for n in expected if "weight" in n}
    for name in kfc.layers:
        wanted = matrix_of(name.split(".")[1])(expected)
        found = rebuilt_gradient(kfc, name, loss)
        # A weight on states of zero has no gradient.
        assert float((found - wanted).abs().max()) <= 1e-9 * max(float(wanted.abs().max()), 1e-3), name


@settings(max_examples=60)
@given(model=recurrent())
def test_the_recurrence_of_a_due_step_agrees_with_the_fused_one_and_draws_the_same_random_numbers(model: Recur) -> None:
    kfc = engine(model)
    torch.manual_seed(3)
    expected, state = model().detach(), torch.get_rng_state()
    torch.manual_seed(3)
    with kfc.capture():
        found = model()
    oracles.assert_equal(found, expected, rtol=1e-12, what="outputs and states")
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in model.rnn.__dict__


CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)]


class Loop(nn.Module):
    """A cell called for every step, in the user's own loop."""

    def __init__(self, cell: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.rnn, self.x = cell, x

    def forward(self) -> Tensor:
        state: Any = None
        for step in self.x:
            state = self.rnn(step, state)
        return torch.cat(flat(state), -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("make", CELLS, ids=["lstm", "gru", "tanh", "relu"])
def test_rows_of_a_cell_called_in_a_loop_rebuild_its_gradient(make: Any, batch: tuple[int, ...], bias: bool) -> None:
    model = Loop(make(FEATURES, HIDDEN, bias=bias).double(), data(4, *batch, FEATURES))
    expected_output = model().detach()
    kfc = engine(model)
    with kfc.capture():
        oracles.assert_equal(model(), expected_output, rtol=1e-12, what="output")
    expected = gradients(model, lambda: curved(model()))
    for part in ("ih", "hh"):
        found = rebuilt_gradient(kfc, f"rnn.{part}", lambda: curved(model()))
        oracles.assert_equal(found, matrix_of(part)(expected), what=part)


@pytest.mark.parametrize("make", CELLS[:3], ids=["lstm", "gru", "tanh"])
def test_one_step_of_one_example_is_exact(make: Any) -> None:
    cell = make(FEATURES, HIDDEN).double()
    h = data(1, HIDDEN, seed=3)
    state = (h, data(1, HIDDEN, seed=4)) if isinstance(cell, nn.LSTMCell) else h
    model = Recur(cell, data(1, FEATURES), state)
    target = classes(1, count=HIDDEN)

    def logits() -> Tensor:
        return model()[:HIDDEN].reshape(1, HIDDEN)

    kfc = observe(model, lambda: F.cross_entropy(logits(), target))
    for part in ("ih", "hh"):
        layer = kfc.layers[f"rnn.{part}"]
        expected = dense_fisher(model, logits, lambda z: F.cross_entropy(z, target), matrix_of(part))
        oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what=f"A⊗G of {part}")


def test_input_factors_are_means_over_all_steps_of_all_sequences() -> None:
    rnn = nn.RNN(FEATURES, HIDDEN, bias=False).double()
    x = data(4, 3, FEATURES)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    states, _ = rnn(x)
    kfc = observe(rnn, lambda: F.mse_loss(rnn(packed)[0].data, torch.zeros(7, HIDDEN).double()), fisher="mc")
    inputs = torch.cat([x[:4, 0], x[:2, 1], x[:1, 2]])
    before = torch.cat([states[:3, 0], states[:1, 1], torch.zeros(3, HIDDEN).double()])  # zero at each start
    oracles.assert_equal(kfc.layers["ih_l0"].A, inputs.T @ inputs / 7, what="A of the input")
    oracles.assert_equal(kfc.layers["hh_l0"].A, before.T @ before / 7, what="A of the state")


def test_a_re_parametrised_recurrent_weight_is_listed() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(FEATURES, HIDDEN), "head": nn.Linear(HIDDEN, 2)})
    nn.utils.parametrizations.weight_norm(model["rnn"], "weight_hh_l0")
    kfc = engine(model, fisher="mc")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 5, FEATURES), classes(5, count=2)
    for _ in range(2):
        train_step(kfc, optimizer, lambda: F.cross_entropy(model["head"](model["rnn"](x)[0][-1]), y))
    rows = [row for row in kfc.coverage() if "rnn" in row.parameter]
    assert {row.treatment for row in rows} == {"diagonal"}
