"""``nn.MultiheadAttention``: four projections, exactly, with the forward unchanged to the last bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, engine, observe, train_step
from tests.layers.rows import Matrix, curved, dense_fisher, gradients, rebuilt_gradient

EMBED = 4
PARTS = ("q", "k", "v", "out_proj")


class Attend(nn.Module):
    """An attention module with one set of inputs and options."""

    def __init__(self, attention: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **options: Any) -> None:
        super().__init__()
        self.attention = attention
        self.inputs, self.options = inputs, options

    def forward(self) -> Tensor:
        output, weights = self.attention(*self.inputs, **self.options)
        return output if weights is None else output + 0.1 * weights.sum()


def matrix_of(part: str, attention: nn.MultiheadAttention) -> Matrix:
    """[W b] of one projection, sliced out by hand."""

    def matrix(tensors: Any) -> Tensor:
        def get(name: str) -> Tensor | None:
            return tensors.get(f"attention.{name}")

        if part == "out_proj":
            return oracles.joint_matrix(get("out_proj.weight"), get("out_proj.bias"))
        own = slice(EMBED * PARTS.index(part), EMBED * (PARTS.index(part) + 1))
        packed, bias = get("in_proj_weight"), get("in_proj_bias")
        weight = get(f"{part}_proj_weight") if packed is None else packed[own]
        return oracles.joint_matrix(weight, None if bias is None else bias[own])

    return matrix


@st.composite
def attentions(draw: st.DrawFn) -> Attend:
    """An attention module with any options, and inputs that fit it."""
    sources = draw(st.sampled_from(["self", "keys are values", "all differ", "other sizes"]))
    kdim, vdim = (3, 5) if sources == "other sizes" else (None, None)
    attention = nn.MultiheadAttention(
        EMBED,
        draw(st.sampled_from([1, 2])),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=kdim,
        vdim=vdim,
        batch_first=draw(st.booleans()),
    ).double()
    attention.train(draw(st.booleans()))
    batch = draw(st.sampled_from([None, 1, 3]))
    queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def sequence(length: int, features: int, seed: int) -> Tensor:
        shape = (length,) if batch is None else (batch, length) if attention.batch_first else (length, batch)
        return data(*shape, features, seed=seed).requires_grad_(draw(st.booleans()))

    query = sequence(queries, EMBED, 1)
    key = query if sources == "self" else sequence(keys, kdim or EMBED, 2)
    value = key if sources in ("self", "keys are values") else sequence(keys, vdim or EMBED, 3)
    keys = queries if sources == "self" else keys
    options: dict[str, Any] = {
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
    }
    mask = draw(st.sampled_from([None, "boolean", "float", "padding", "both"]))
    blocked = torch.ones(queries, keys).triu(1).bool()
    if mask in ("boolean", "both"):
        options["attn_mask"] = blocked
    if mask == "float":
        options["attn_mask"] = data(queries, keys, seed=4)
    if mask in ("padding", "both"):
        padding = torch.zeros(*(() if batch is None else (batch,)), keys).bool()
        padding[..., -1] = keys > 1
        options["key_padding_mask"] = padding
    return Attend(attention, (query, key, value), **options)


@examples(80)
@given(model=attentions())
def test_rows_of_every_projection_rebuild_its_gradient(model: Attend) -> None:
    kfc = engine(model)

    def loss() -> Tensor:
        torch.manual_seed(3)  # the dropout of both forwards
        return curved(model())

    expected = gradients(model, loss)
    for part in PARTS:
        found = rebuilt_gradient(kfc, f"attention.{part}", loss)
        wanted = matrix_of(part, model.attention)(expected)
        size = max(float(wanted.abs().max()), 1e-3)  # keys have no gradient where there is one to attend to
        assert float((found - wanted).abs().max()) <= 1e-9 * size, f"{part}: {oracles.ratio(found, wanted)}"


@examples(30)
@given(model=attentions())
def test_a_due_step_changes_neither_outputs_nor_random_numbers(model: Attend) -> None:
    kfc = engine(model)
    torch.manual_seed(3)
    expected, state = model(), torch.get_rng_state()
    torch.manual_seed(3)
    with kfc.capture():
        found = model()
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in model.attention.__dict__


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
def test_factors_equal_the_dense_fisher_where_a_projection_has_one_row(likelihood: str, separate: bool) -> None:
    def loss(z: Tensor) -> Tensor:
        return F.mse_loss(z, target) if likelihood == "gaussian" else F.cross_entropy(z.reshape(1, -1), target)

    target = data(1, 1, EMBED, seed=9) if likelihood == "gaussian" else classes(1, count=EMBED)
    sizes = {"kdim": 3, "vdim": 5} if separate else {}
    # One query of one example has one row in q and out_proj; one key has one in v (and k then has no gradient).
    for keys, parts in ((3, ("q", "out_proj")), (1, ("v", "out_proj"))):
        attention = nn.MultiheadAttention(EMBED, 2, **sizes).double()
        nn.init.normal_(attention.in_proj_bias)
        inputs = (data(1, 1, EMBED), data(keys, 1, sizes.get("kdim", EMBED)), data(keys, 1, sizes.get("vdim", EMBED)))
        model = Attend(attention, inputs, need_weights=False)
        kfc = observe(model, lambda model=model: loss(model()))
        for part in parts:
            layer = kfc.layers[f"attention.{part}"]
            expected = dense_fisher(model, model, loss, matrix_of(part, attention))
            assert float(expected.abs().max()) > 0
            oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what=f"A⊗G of {part}")


@pytest.mark.parametrize("batch_first", [False, True])
def test_projections_are_shared_by_expand_whatever_the_setting_is(batch_first: bool) -> None:
    x = data(3, 5, EMBED)  # three examples
    attention = nn.MultiheadAttention(EMBED, 2, batch_first=batch_first, bias=False).double()
    given_x = x if batch_first else x.transpose(0, 1)
    model = Attend(attention, (given_x,) * 3, need_weights=False)
    expand, reduce = (
        observe(model, lambda: F.mse_loss(model(), torch.zeros_like(given_x)), weight_sharing=sharing, fisher="mc")
        for sharing in ("expand", "reduce")
    )
    for part in PARTS:
        for name, factor in expand.layers[f"attention.{part}"].factors.items():
            oracles.assert_equal(reduce.layers[f"attention.{part}"].factors[name], factor, what=f"{name} of {part}")
    reasons = {row.reason for row in reduce.coverage()}
    assert reasons == {"shared by 'expand': summed over positions, the derivatives at the keys of attention are zero"}
    assert {row.reason for row in expand.coverage()} == {""}


def layers_of_transformers() -> list[Any]:
    options = {"dim_feedforward": 5, "dropout": 0.1}
    return [
        pytest.param(lambda bf: nn.TransformerEncoderLayer(EMBED, 2, batch_first=bf, **options), 1, id="encoder"),
        pytest.param(
            lambda bf: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(EMBED, 2, batch_first=bf, norm_first=True, **options),
                2,
                enable_nested_tensor=False,
            ),
            1,
            id="encoder stack",
        ),
        pytest.param(lambda bf: nn.TransformerDecoderLayer(EMBED, 2, batch_first=bf, **options), 2, id="decoder"),
        pytest.param(lambda bf: nn.Transformer(EMBED, 2, 1, 1, batch_first=bf, **options), 2, id="transformer"),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "inputs"), layers_of_transformers())
def test_transformers_train_with_every_parameter_covered(
    make: Any, inputs: int, training: bool, batch_first: bool
) -> None:
    model = make(batch_first).train(training)
    x = torch.randn(3, 4, EMBED)
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    y = torch.randn(3, 4, EMBED)
    losses = [train_step(kfc, optimizer, lambda: F.mse_loss(model(*[x] * inputs), y)) for _ in range(12)]
    assert losses[-1] < 0.95 * losses[0]
    coverage = kfc.coverage()
    assert sum(row.numel for row in coverage) == sum(p.numel() for p in model.parameters())
    kinds = {row.parameter: row.treatment for row in coverage}
    assert all(kinds[name] == "kfc" for name in kinds if "norm" not in name), kinds


def test_feed_forward_layers_of_a_transformer_reduce_over_its_own_sequence_axis() -> None:
    for batch_first in (False, True):
        layer = nn.TransformerEncoderLayer(EMBED, 2, 5, batch_first=batch_first, dropout=0.0).double()
        x = data(3, 5, EMBED) if batch_first else data(3, 5, EMBED).transpose(0, 1)
        seen: list[Tensor] = []
        handle = layer.linear1.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].detach()))
        kfc = observe(layer, lambda layer=layer, x=x: F.mse_loss(layer(x), x), fisher="mc", weight_sharing="reduce")
        handle.remove()
        rows = seen[0].mean(1 if batch_first else 0)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        oracles.assert_equal(kfc.layers["linear1"].A, rows.T @ rows / 3, what="A")


def test_key_and_value_biases_get_a_diagonal_curvature_beside_the_projections() -> None:
    model = Attend(nn.MultiheadAttention(EMBED, 2, add_bias_kv=True), (torch.randn(3, 2, EMBED),) * 3)
    rows = {row.parameter: row for row in engine(model).coverage()}
    assert {name: row.treatment for name, row in rows.items()} == {
        "attention.in_proj_weight": "kfc",
        "attention.in_proj_bias": "kfc",
        "attention.out_proj.weight": "kfc",
        "attention.out_proj.bias": "kfc",
        "attention.bias_k": "diagonal",
        "attention.bias_v": "diagonal",
    }
    assert rows["attention.in_proj_weight"].factor_shapes["k.A"] == (EMBED + 1, EMBED + 1)


@pytest.mark.parametrize("pattern", ["attention.out_proj", "attention"])
def test_the_output_projection_is_left_out_by_its_own_name(pattern: str) -> None:
    model = Attend(nn.MultiheadAttention(EMBED, 2), (torch.randn(3, 2, EMBED),) * 3)
    excluded = engine(model, exclude=[pattern])
    included = engine(model, include=[pattern])
    own = {"attention.out_proj"} if pattern.endswith("out_proj") else {"attention.q", "attention.k", "attention.v"}
    assert set(included.layers) == own
    assert set(excluded.layers) == {f"attention.{part}" for part in PARTS} - own
    assert {row.treatment for row in excluded.coverage()} == {"kfc", "plain"}


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_a_re_parametrised_projection_is_listed_and_training_goes_on(name: str) -> None:
    model = Attend(nn.MultiheadAttention(EMBED, 2), (torch.randn(3, 2, EMBED),) * 3)
    holder = model.attention.get_submodule(name.rpartition(".")[0])
    nn.utils.parametrizations.weight_norm(holder, name.rpartition(".")[2])
    model = nn.ModuleDict({"attend": model, "head": nn.Linear(EMBED, 3)})
    kfc = engine(model, fisher="mc")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        train_step(kfc, optimizer, lambda: F.cross_entropy(model["head"](model["attend"]()[0]), classes(2, count=3)))
    treatments = {row.parameter: row.treatment for row in kfc.coverage()}
    assert {treatment for parameter, treatment in treatments.items() if "parametrizations" in parameter} == {"diagonal"}
    assert treatments["attend.attention.in_proj_bias"] == ("diagonal" if name == "in_proj_weight" else "kfc")


def test_nothing_is_left_on_the_module_after_an_exception_inside_the_attention_function() -> None:
    wrong_mask = torch.zeros(7, 7)
    model = Attend(nn.MultiheadAttention(EMBED, 2), (torch.randn(3, 2, EMBED),) * 3, attn_mask=wrong_mask)
    kfc = engine(model)
    with pytest.raises(RuntimeError, match="attn_mask"), kfc.capture():
        model()
    assert "forward" not in model.attention.__dict__
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_copy_made_during_a_due_step_has_its_own_forward() -> None:
    model = Attend(nn.MultiheadAttention(EMBED, 2), (torch.randn(3, 2, EMBED),) * 3)
    with engine(model).capture():
        copied = copy.deepcopy(model.attention)
        pickled = pickle.loads(pickle.dumps(model.attention))
    expected = model()
    for twin in (copied, pickled):
        assert twin.forward.__self__ is twin
        with torch.no_grad():
            twin.out_proj.weight.zero_()
        assert torch.equal(model(), expected)
        assert float(twin(*model.inputs)[0].detach().abs().max()) == 0  # its own weights, not the original's


def test_a_subclass_that_calls_its_output_projection_is_listed_not_crashed() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.out_proj(F.linear(query, self.in_proj_weight[:EMBED], self.in_proj_bias[:EMBED]))

    model = Own(EMBED, 2)
    x = torch.randn(3, 2, EMBED)
    kfc = observe(model, lambda: F.mse_loss(model(x, x, x), x), fisher="mc")
    treatments = {row.parameter: row.treatment for row in kfc.coverage()}
    assert treatments["out_proj.weight"] == "kfc"
    assert treatments["in_proj_weight"] == "diagonal"


@pytest.mark.slow
def test_a_compiled_transformer_layer_is_seen_on_due_steps_and_stays_compiled_between_them() -> None:
    torch._dynamo.reset()
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    model = nn.TransformerEncoderLayer(EMBED, 2, 5, dropout=0.0, batch_first=True)
    run = torch.compile(model, backend=backend)
    x, y = torch.randn(3, 4, EMBED), torch.randn(3, 4, EMBED)
    kfc = engine(model, fisher="mc", factor_every_n_steps=3, inverse_every_n_steps=3, warmup_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(7):
        train_step(kfc, optimizer, lambda: F.mse_loss(run(x), y))
    assert len(compiled) == 1
    assert kfc.layers["self_attn.k"].A.shape == (EMBED + 1, EMBED + 1)
