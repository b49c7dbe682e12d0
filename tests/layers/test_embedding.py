"""Embeddings: A is the diagonal of token frequencies; gradients may be sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, observe, train_step
from tests.layers.rows import curved, dense_fisher, gradients, rebuilt_gradient

TOKENS, FEATURES = 6, 3


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return classes(*shape, count=TOKENS, seed=seed)


def table(tensors: Any) -> Tensor:
    """The gradient matrix (d_out, tokens)."""
    return tensors["0.weight"].T


@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    padding=st.sampled_from([None, 0, -1]),
    sparse=st.booleans(),
    max_norm=st.sampled_from([None, 1.0]),
)
def test_rows_of_an_embedding_rebuild_its_gradient(
    leading: list[int], padding: int | None, sparse: bool, max_norm: float | None
) -> None:
    assume(leading or not sparse)  # torch itself fails on a single index with padding and a sparse gradient
    model = nn.Sequential(
        nn.Embedding(TOKENS, FEATURES, padding_idx=padding, sparse=sparse, max_norm=max_norm)
    ).double()
    x = tokens(*leading)
    kfc = engine(model)

    def loss() -> Tensor:
        return curved(model(x))

    expected = table(gradients(model, loss))
    found = rebuilt_gradient(kfc, "0", loss)
    assert float((found - expected).abs().max()) <= 1e-9 * max(float(expected.abs().max()), 1e-3)


@given(leading=st.lists(st.integers(1, 4), min_size=1, max_size=2), padding=st.sampled_from([None, 2]))
def test_input_factor_of_an_embedding_is_the_frequency_of_each_token_that_is_not_padding(
    leading: list[int], padding: int | None
) -> None:
    model = nn.Sequential(nn.Embedding(TOKENS, FEATURES, padding_idx=padding)).double()
    x = tokens(*leading)
    x.view(-1)[0] = 1  # never padding alone
    y = data(*leading, FEATURES)
    layer = observe(model, lambda: F.mse_loss(model(x), y, reduction="sum")).layers["0"]
    kept = [int(token) for token in x.reshape(-1) if int(token) != padding]
    counts = torch.tensor([kept.count(token) for token in range(TOKENS)], dtype=torch.float64)
    oracles.assert_equal(layer.A, counts / len(kept), what="A")
    # A sum of squared differences has Fisher 2I at each row that reaches the weight.
    oracles.assert_equal(layer.G, 2.0 * len(kept) * torch.eye(FEATURES).double(), what="G")


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_one_token_of_one_example_is_exact(likelihood: str) -> None:
    model = nn.Sequential(nn.Embedding(TOKENS, FEATURES), nn.Tanh(), nn.Linear(FEATURES, 4)).double()
    x = tokens(1)
    target = classes(1, count=4) if likelihood == "categorical" else data(1, 4)
    loss = F.cross_entropy if likelihood == "categorical" else F.mse_loss
    layer = observe(model, lambda: loss(model(x), target)).layers["0"]
    expected = dense_fisher(model, lambda: model(x), lambda z: loss(z, target), table)
    oracles.assert_equal(oracles.kron(torch.diag(layer.A), layer.G), expected, what="A⊗G")


def test_a_linear_net_on_tokens_with_squared_error_is_exact_for_any_number_of_examples() -> None:
    model = nn.Sequential(nn.Embedding(TOKENS, FEATURES, padding_idx=2), nn.Linear(FEATURES, 2)).double()
    x, y = tokens(5, 4), data(5, 4, 2)
    assert bool((x == 2).any())
    layer = observe(model, lambda: F.mse_loss(model(x), y)).layers["0"]
    expected = dense_fisher(model, lambda: model(x), lambda z: F.mse_loss(z, y), table)
    oracles.assert_equal(oracles.kron(torch.diag(layer.A), layer.G), expected, what="A⊗G")


def net(*, sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(TOKENS, FEATURES, sparse=sparse), nn.Flatten(), nn.Linear(4 * FEATURES, 3))


def test_a_sparse_gradient_stays_sparse_and_gets_the_update_of_the_dense_one() -> None:
    x, y = tokens(5, 4), classes(5, count=3)
    x[x == 4] = 0  # a token without a gradient
    updates = []
    for sparse in (False, True):
        model = net(sparse=sparse)
        kfc = observe(model, lambda model=model: F.cross_entropy(model(x), y))
        F.cross_entropy(model(x), y).backward()
        kfc.precondition(lr=0.1)
        updates.append(model[0].weight.grad)
    dense, sparse_update = updates
    assert sparse_update.is_sparse
    assert torch.equal(dense[4], torch.zeros(FEATURES))
    oracles.assert_equal(sparse_update.to_dense(), dense, rtol=1e-5, what="update")


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_embeddings_train_with_optimizers_that_take_sparse_gradients(optimizer_type: Any) -> None:
    model, x, y = net(sparse=True), tokens(8, 4), classes(8, count=3)
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    sparse = [optimizer_type([model[0].weight], lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)]
    losses = []
    for _ in range(15):
        for optimizer in sparse:
            optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(x), y)
        kfc.update(loss)
        loss.backward()
        for optimizer in sparse:
            kfc.precondition(optimizer=optimizer)
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_tied_sparse_embedding_gets_a_diagonal_curvature_and_trains() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.again = (nn.Embedding(TOKENS, FEATURES, sparse=True) for _ in range(2))
            self.head, self.other = nn.Linear(FEATURES, TOKENS), nn.Linear(FEATURES, FEATURES)
            self.again.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.table(x) + self.again(x))

    model, x, y = Tied(), tokens(8), torch.randn(8, FEATURES)
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [train_step(kfc, optimizer, lambda: F.mse_loss(model(x), y)) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    assert model.again.weight.grad.is_sparse
    treatments = {row.parameter: row.treatment for row in kfc.coverage()}
    assert (treatments["table.weight"], treatments["again.weight"]) == ("kfc", "diagonal")


def test_gradients_rescaled_by_token_frequency_are_listed() -> None:
    model = nn.Sequential(nn.Embedding(TOKENS, FEATURES, scale_grad_by_freq=True), nn.Linear(FEATURES, 2))
    (row, *_) = engine(model).coverage()
    assert (row.treatment, row.reason) == ("diagonal", "scale_grad_by_freq changes its gradient")


@st.composite
def bags(draw: st.DrawFn) -> tuple[nn.EmbeddingBag, dict[str, Tensor]]:
    """An EmbeddingBag with any options, and inputs that fit it."""
    mode = draw(st.sampled_from(["sum", "mean"]))
    last = draw(st.booleans())
    bag = nn.EmbeddingBag(
        TOKENS,
        FEATURES,
        mode=mode,
        sparse=draw(st.booleans()),
        include_last_offset=last,
        padding_idx=draw(st.sampled_from([None, 1])),
    ).double()
    if draw(st.booleans()):
        inputs = {"input": tokens(draw(st.integers(1, 3)), draw(st.integers(1, 4)))}
    else:
        sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        inputs = {"input": tokens(int(bounds[-1])), "offsets": bounds if last else bounds[:-1]}
    if mode == "sum" and draw(st.booleans()):
        inputs["per_sample_weights"] = data(*inputs["input"].shape)
    return bag, inputs


class Bagged(nn.Module):
    """An EmbeddingBag on inputs given by keyword."""

    def __init__(self, bag: nn.EmbeddingBag, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.bag, self.inputs = bag, inputs

    def forward(self) -> Tensor:
        return self.bag(**self.inputs)


@given(case=bags())
def test_rows_of_an_embedding_bag_rebuild_its_gradient(case: tuple[nn.EmbeddingBag, dict[str, Tensor]]) -> None:
    model = Bagged(*case)

    def loss() -> Tensor:
        return curved(model())

    expected = gradients(model, loss)["bag.weight"].T
    found = rebuilt_gradient(engine(model), "bag", loss)
    assert float((found - expected).abs().max()) <= 1e-9 * max(float(expected.abs().max()), 1e-3)


@given(case=bags())
def test_input_factor_of_an_embedding_bag_is_the_diagonal_of_the_exact_one(
    case: tuple[nn.EmbeddingBag, dict[str, Tensor]],
) -> None:
    bag, inputs = case
    model = Bagged(bag, inputs)
    kfc = observe(model, lambda: F.mse_loss(model(), torch.zeros_like(model().detach())))
    # The module is linear in its table: its rows are the derivative of one feature by the table's column.
    rows = oracles.jacobian(
        lambda column: F.embedding_bag(
            weight=column.expand(TOKENS, FEATURES),
            mode=bag.mode,
            include_last_offset=bag.include_last_offset,
            padding_idx=bag.padding_idx,
            **inputs,
        )[:, 0],
        torch.zeros(TOKENS, 1).double(),
    )
    oracles.assert_equal(kfc.layers["bag"].A, rows.square().mean(0), what="diagonal of A")


def test_one_bag_of_one_token_is_exact_and_a_maximum_is_listed() -> None:
    model = nn.Sequential(nn.EmbeddingBag(TOKENS, FEATURES, mode="sum"), nn.Tanh(), nn.Linear(FEATURES, 4)).double()
    x, target = tokens(1, 1), classes(1, count=4)
    layer = observe(model, lambda: F.cross_entropy(model(x), target)).layers["0"]
    expected = dense_fisher(model, lambda: model(x), lambda z: F.cross_entropy(z, target), table)
    oracles.assert_equal(oracles.kron(torch.diag(layer.A), layer.G), expected, what="A⊗G")
    largest = nn.Sequential(nn.EmbeddingBag(TOKENS, FEATURES, mode="max"), nn.Linear(FEATURES, 2))
    (row, *_) = engine(largest).coverage()
    assert (row.treatment, row.reason) == ("diagonal", 'mode="max" takes each feature from another token')
