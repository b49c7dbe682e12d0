"""Recurrent modules: the products of their gates, exactly, from a recurrence that agrees with the fused one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, engine, observe, train_step
from tests.layers.rows import curved, dense_fisher, gradients, rebuilt_gradient

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


@examples(60)
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


@examples(60)
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


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_unrecognised_loss_has_the_empirical_fisher_of_its_examples_not_of_its_steps(batch_first: bool) -> None:
    rnn = nn.RNN(FEATURES, HIDDEN, batch_first=batch_first).double()
    x = data(3, 5, FEATURES) if batch_first else data(5, 3, FEATURES)  # three examples
    kfc = observe(rnn, lambda: rnn(x)[1].pow(4).sum(-1).mean(), fisher="empirical")
    for part in ("ih_l0", "hh_l0"):
        g = []
        for example in range(3):
            own = x[example] if batch_first else x[:, example]
            parameters = list(rnn.parameters())
            before = [p.detach().clone() for p in parameters]
            # The derivative at the gates of each step, by a bias of its own for every step.
            shifts = torch.zeros(5, HIDDEN).double().requires_grad_(True)
            h = torch.zeros(HIDDEN).double()
            for step, shift in zip(own, shifts, strict=True):
                h = (before[0] @ step + before[2] + before[1] @ h + before[3] + shift).tanh()
            g.append(torch.autograd.grad(h.pow(4).sum(), shifts)[0])
        rows = torch.cat(g)
        loss = rnn(x)[1].pow(4).sum(-1).mean().detach()
        oracles.assert_equal(kfc.layers[part].G, rows.T @ rows / 3 / (2 * loss), what=f"G of {part}")


class FusedCalls(torch.overrides.TorchFunctionMode):
    """Counts the calls of torch's fused recurrences."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.lstm, torch.gru)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "no_grad", "fused"), [(False, False, 0), (True, False, 1), (False, True, 1)])
def test_the_fused_recurrence_runs_on_due_steps_wherever_nothing_is_to_be_seen(
    frozen: bool, no_grad: bool, fused: int
) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(FEATURES, HIDDEN), "head": nn.Linear(HIDDEN, 2)})
    model["rnn"].requires_grad_(not frozen)
    with engine(model).capture(), FusedCalls() as calls, torch.set_grad_enabled(not no_grad):
        model["rnn"](torch.randn(4, 5, FEATURES))
    assert calls.count == fused


class Checkpointed(nn.Module):
    """A recurrent module inside an activation checkpoint, and a head."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = checkpoint(self.rnn, x, use_reentrant=False)
        return self.head(output[-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_module_inside_an_activation_checkpoint_is_listed_and_trains(kind: Any) -> None:
    model, x, y = Checkpointed(kind(FEATURES, HIDDEN)), torch.randn(4, 12, FEATURES), classes(12, count=2)
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.warns(UserWarning, match="not seen inside an activation checkpoint"):
        losses = [train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), y)) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    treatments = {row.parameter: row.treatment for row in kfc.coverage()}
    assert treatments["rnn.weight_hh_l0"] == "diagonal"
    assert treatments["head.weight"] == "kfc"


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell], ids=lambda kind: kind.__name__)
def test_under_autocast_the_results_have_the_fused_functions_precision(make: Any) -> None:
    rnn = make(FEATURES, HIDDEN)
    x = torch.randn(4, 3, FEATURES) if isinstance(rnn, nn.RNNBase) else torch.randn(3, FEATURES)
    kfc = engine(rnn)
    with torch.autocast("cpu", torch.bfloat16):
        expected = flat(rnn(x))
        with kfc.capture():
            found = flat(rnn(x))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).detach().abs().max()) < 0.02
