"""The comparison equals that of dense matrices, and has no error for exact approximations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import Categorical, LossNotRecognisedError
from lightning_kfc.analysis import compare_curvature, dense
from lightning_kfc.analysis.assumptions import RowRecorder, assumption_errors
from lightning_kfc.curvature.find_layers import find_layers
from lightning_kfc.settings import Settings
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, small_conv_net

DAMPING = 0.05

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z, classes(3, count=3)),
    "weighted": lambda z: F.cross_entropy(
        z, torch.tensor([2, -100, 1]), weight=torch.tensor([1.0, 3.0, 0.5]).double(), label_smoothing=0.1
    ),
    "bernoulli": lambda z: F.binary_cross_entropy_with_logits(z, torch.zeros_like(z), reduction="sum"),
    "gaussian": lambda z: 0.3 * F.mse_loss(z, torch.zeros_like(z)),
    "two_terms": lambda z: F.cross_entropy(z, classes(3, count=3)) + 0.1 * F.mse_loss(z, torch.ones_like(z)),
}


class Case:
    """A small conv net with the matrices of its first layer, from oracles alone."""

    def __init__(self) -> None:
        self.model, self.x, self.loss = small_conv_net(), data(3, 2, 6, 6), LOSSES["cross_entropy"]
        self.F = oracles.dense_fisher(self.model, self.x, self.loss, "0")
        # Position by position: rows of patches, and the curvature by the layer's own output.
        self.rows = oracles.conv_rows(self.x, self.model[0]).reshape(3, 36, 19)
        J = oracles.jacobian(self.model[1:], self.model[0](self.x))
        by_output = J.T @ oracles.logits_hessian(self.loss, self.model(self.x)) @ J
        self.curvature = by_output.reshape(3, 3, 36, 3, 3, 36)
        self.A = torch.einsum("nti,ntj->ij", self.rows, self.rows) / (3 * 36)
        self.G = torch.einsum("natnbt->ab", self.curvature)
        self.gradient = oracles.joint_matrix(
            *torch.autograd.grad(self.loss(self.model(self.x)), [*self.model[0].parameters()])
        )

    def error(self, matrix: Tensor) -> float:
        return float((matrix - self.F).norm() / self.F.norm())

    def solved(self, matrix: Tensor) -> Tensor:
        return torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).double(), self.gradient.flatten())

    def cosine(self, step: Tensor) -> float:
        return float(torch.cosine_similarity(step.flatten(), self.solved(self.F), dim=0))


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    return Case()


@pytest.fixture(scope="module")
def compared(case: Case) -> Any:
    return compare_curvature(case.model, lambda: case.loss(case.model(case.x)), damping=DAMPING)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("layer", ["0", "2", "5"])
def test_the_seeds_gradients_sum_to_the_dense_fisher_block(layer: str, loss: Callable[[Tensor], Tensor]) -> None:
    model, x = small_conv_net(), data(3, 2, 6, 6)
    _, terms = dense.evaluate(model, lambda: loss(model(x)))
    u = dense.seed_gradients(terms, {layer: find_layers(model, Settings()).layers[layer].adapter})[layer]
    expected = oracles.dense_fisher(model, x, loss, layer)
    oracles.assert_equal(u.T @ u, expected, what=f"block of {layer}")
    oracles.assert_equal(
        dense.eigenvalues_of_rows(u), torch.linalg.eigvalsh(expected).flip(0), rtol=1e-9, what="eigenvalues"
    )


def test_errors_are_those_of_the_dense_matrices(case: Case, compared: Any) -> None:
    Q = oracles.kron(torch.linalg.eigh(case.A)[1], torch.linalg.eigh(case.G)[1])
    diagonal = (Q.T @ case.F @ Q).diagonal()
    mean = float(case.F.diagonal().mean())
    expected = {
        "kfc": oracles.kron(case.A, case.G),
        "ekfac": Q @ torch.diag(diagonal) @ Q.T,
        "diagonal": torch.diag(case.F.diagonal()),
        "identity": mean * torch.eye(len(case.F)).double(),
    }
    layer = compared["0"]
    assert set(layer.names()) == {*expected, "reduce"}
    for name, matrix in expected.items():
        found = layer[name]
        assert found.error == pytest.approx(case.error(matrix), rel=1e-6), name
        multiple = (matrix * case.F).sum() / matrix.square().sum()
        assert found.shape_error == pytest.approx(case.error(multiple * matrix), rel=1e-6), name
        values = torch.linalg.eigvalsh(matrix).flip(0)
        oracles.assert_equal(found.eigenvalues, values, rtol=1e-7, what=name)
        step = case.solved(matrix)
        assert found.cosine == pytest.approx(case.cosine(step), rel=1e-6), name
        wanted = case.solved(case.F)
        assert found.distance == pytest.approx(float((step - wanted).norm() / wanted.norm()), rel=1e-6), name
    split = oracles.dense_solve(*oracles.pi_damped(case.A, case.G, DAMPING), case.gradient)
    assert layer["kfc"].split_cosine == pytest.approx(case.cosine(split), rel=1e-6)
    assert layer["ekfac"].split_cosine is None


def test_reduce_averages_inputs_and_sums_derivatives_over_locations(case: Case, compared: Any) -> None:
    a = case.rows.mean(1)
    G = torch.einsum("natnbs->ab", case.curvature)
    matrix = oracles.kron(a.T @ a / len(a), G)
    assert compared["0"]["reduce"].error == pytest.approx(case.error(matrix), rel=1e-6)


def test_each_assumption_s_error_is_that_of_the_sum_over_pairs_of_locations(case: Case, compared: Any) -> None:
    independent, uncorrelated = torch.zeros_like(case.F), torch.zeros_like(case.F)
    for t in range(36):
        for s in range(36):
            a = case.rows[:, t].T @ case.rows[:, s] / 3
            g = torch.einsum("nanb->ab", case.curvature[:, :, t, :, :, s])
            pair = torch.kron(g, a)
            independent += pair
            uncorrelated += pair if s == t else 0
    found = {entry.name: entry.error for entry in compared["0"].assumptions}
    assert found["independent"] == pytest.approx(case.error(independent), rel=1e-6)
    assert found["uncorrelated"] == pytest.approx(case.error(uncorrelated), rel=1e-6)
    assert found["homogeneous"] == pytest.approx(compared["0"]["kfc"].error, rel=1e-9)
    assert len({round(error, 6) for error in found.values()}) == 3


def linear_chain() -> tuple[nn.Sequential, Tensor, Callable[[Tensor], Tensor]]:
    return double(nn.Linear(4, 3), nn.Linear(3, 5)), data(6, 4), lambda z: F.mse_loss(z, torch.zeros_like(z))


def one_example() -> tuple[nn.Sequential, Tensor, Callable[[Tensor], Tensor]]:
    net = double(nn.Conv2d(2, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(3, 4))
    return net, data(1, 2, 4, 4), lambda z: F.cross_entropy(z, torch.tensor([1]))


def pointwise() -> tuple[nn.Sequential, Tensor, Callable[[Tensor], Tensor]]:
    net = double(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1))
    return net, data(2, 2, 5, 5), lambda z: F.mse_loss(z, torch.zeros_like(z))


def summed() -> tuple[nn.Sequential, Tensor, Callable[[Tensor], Tensor]]:
    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((2, 3))

    net = double(nn.Conv2d(2, 3, 3), Total())
    return net, data(4, 2, 5, 5), lambda z: F.mse_loss(z, torch.zeros_like(z))


@pytest.mark.parametrize(
    ("make", "exact", "not_exact"),
    [
        (linear_chain, ("kfc", "reduce", "ekfac"), ("diagonal",)),
        (one_example, ("kfc", "reduce", "ekfac"), ("diagonal",)),
        (pointwise, ("kfc", "ekfac"), ("reduce", "diagonal")),
        (summed, ("reduce",), ("kfc", "diagonal")),
    ],
)
def test_no_error_is_found_where_the_approximation_is_exact(
    make: Any, exact: tuple[str, ...], not_exact: tuple[str, ...]
) -> None:
    model, x, loss = make()
    comparison = compare_curvature(model, lambda: loss(model(x)))
    assert comparison.layers
    for layer in comparison.layers.values():
        for name in exact:
            found = layer[name]
            assert found.error < 1e-10, f"{layer.layer} {name}: {found.error}"
            assert found.distance < 1e-8, f"{layer.layer} {name}: {found.distance}"
            assert found.cosine == pytest.approx(1, abs=1e-12)
        for name in not_exact:
            # A linear layer sees no locations: there, expand and reduce are one.
            if layer.kind != "Linear" or name == "diagonal":
                assert layer[name].error > 1e-2, f"{layer.layer} {name}"
        if "kfc" in exact:
            assert [entry.error < 1e-10 for entry in layer.assumptions] == [True] * 3


def test_a_multiple_of_the_identity_is_exact_where_the_block_is_one() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    # Inputs whose second moment is the identity, and squared error.
    model, x = Only(), torch.eye(3).double()
    layer = compare_curvature(model, lambda: F.mse_loss(model(x), torch.zeros_like(x)))["layer"]
    for approximation in layer.approximations:
        assert approximation.error < 1e-12, approximation.name
        assert approximation.cosine == pytest.approx(1)


def test_a_grouped_convolution_has_no_curvature_between_its_groups() -> None:
    model, x = double(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 1, 3)), data(3, 4, 5, 5)
    target = torch.zeros(3, 1, 1, 1).double()
    layer = compare_curvature(model, lambda: F.mse_loss(model(x), target))["0"]
    exact = oracles.dense_fisher(model, x, lambda z: F.mse_loss(z, target), "0")
    blocks = []
    for group in (slice(0, 2), slice(2, 4)):
        rows = F.unfold(x[:, group], 3).transpose(1, 2).reshape(-1, 18)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        J = oracles.jacobian(model[1:], model[0](x))
        by_output = (J.T @ (2 / 3 * torch.eye(3).double()) @ J).reshape(3, 4, 9, 3, 4, 9)
        G = torch.einsum("natnbt->ab", by_output)[group, group]
        blocks.append(oracles.kron(rows.T @ rows / len(rows), G))
    expected = float((torch.block_diag(*blocks) - exact).norm() / exact.norm())
    assert layer["kfc"].error == pytest.approx(expected, rel=1e-8)
    assert layer.assumptions == ()


def test_a_layer_that_is_called_twice_is_compared_without_its_assumptions() -> None:
    layer = nn.Linear(3, 3).double()
    x = data(4, 3)

    def loss() -> Tensor:
        return F.mse_loss(layer(torch.tanh(layer(x))), x)

    found = compare_curvature(layer, loss)[""]
    assert found.assumptions == ()
    assert 0 < found["kfc"].error < 1


def test_the_model_is_left_as_it_was() -> None:
    model = double(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 3))
    x, y = data(4, 1, 5, 5), classes(4, count=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    comparison = compare_curvature(model, lambda: F.cross_entropy(model(x), y))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())
    assert "pair of Kronecker factors" in comparison.skipped["1"]
    # Every evaluation of the loss has dropped the same units, so that one Fisher matrix is compared.
    assert comparison["4"]["kfc"].error == pytest.approx(comparison["4"]["reduce"].error)


def test_large_layers_are_left_out_with_the_reason_and_patterns_choose() -> None:
    model, x, y = small_conv_net(), data(2, 2, 6, 6), classes(2, count=3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    comparison = compare_curvature(model, loss, max_parameters=60)
    assert set(comparison.layers) == {"0", "5"}
    assert comparison.skipped == {"2": "112 parameters > max_parameters=60"}
    assert "Left out: 2 (112 parameters > max_parameters=60)" in str(comparison)
    assert set(compare_curvature(model, loss, layers="5").layers) == {"5"}
    with pytest.raises(ValueError, match="matches no module"):
        compare_curvature(model, loss, layers="6")


def test_frozen_parts_are_not_compared() -> None:
    model, x, y = small_conv_net(), data(2, 2, 6, 6), classes(2, count=3)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    comparison = compare_curvature(model, lambda: F.cross_entropy(model(x), y))
    assert set(comparison.layers) == {"2", "5"}
    assert comparison["2"].parameters == model[2].weight.numel()


def test_too_many_terms_and_unknown_losses_are_errors_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_conv_net(), data(2, 2, 6, 6)
    with pytest.raises(LossNotRecognisedError, match="recognised no term of the loss"):
        compare_curvature(model, lambda: model(x).cosh().log().mean())
    monkeypatch.setattr(dense, "MAX_PASSES", 5)
    with pytest.raises(ValueError, match=r"takes 6 back-propagations.*fewer examples"):
        compare_curvature(model, lambda: F.cross_entropy(model(x), classes(2, count=3)))
    with pytest.raises(ValueError, match="damping must be a positive number"):
        compare_curvature(model, lambda: model(x).sum(), damping=0)


def test_a_named_likelihood_replaces_the_recognised_loss() -> None:
    model, x, y = small_conv_net(), data(2, 2, 6, 6), classes(2, count=3)
    known = compare_curvature(model, lambda: F.cross_entropy(model(x), y))
    named = compare_curvature(
        model, lambda: -model(x).log_softmax(1)[range(2), y].mean(), likelihood=Categorical(output_of="5")
    )
    for name in known.layers:
        oracles.assert_equal(named[name].eigenvalues, known[name].eigenvalues, what=name)
        assert named[name]["kfc"].error == pytest.approx(known[name]["kfc"].error)


def test_the_table_has_a_line_for_each_layer_and_approximation(compared: Any) -> None:
    lines = str(compared).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if "KFC (expand)" in line] == ["0", "2", "5"]
    assert sum("EKFAC" in line for line in lines) == 3
    shown = next(line for line in lines if line.startswith("0 (57)")).split()
    assert float(shown[4]) == pytest.approx(compared["0"]["kfc"].error, abs=5e-4)
    with pytest.raises(KeyError, match="no approximation 'hessian'"):
        compared["0"]["hessian"]


def test_rows_of_other_examples_than_the_loss_s_are_not_taken_apart() -> None:
    # Logits (N * S, K) of a language model: the terms' first axis is not that of the layer's examples.
    model, x, y = double(nn.Linear(3, 4)), data(2, 3, 3), classes(6, count=4)
    adapter = find_layers(model, Settings()).layers["0"].adapter
    recorder = RowRecorder({"0": adapter})
    with recorder.recording():
        _, terms = dense.evaluate(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y))
    assert recorder.rows(terms) == {}
    recorder = RowRecorder({"0": adapter})
    with recorder.recording():
        _, terms = dense.evaluate(model, lambda: F.cross_entropy(model(x).movedim(2, 1), y.reshape(2, 3)))
    rows = recorder.rows(terms)["0"]
    u = dense.seed_gradients(terms, {"0": adapter})["0"]
    # One layer: the derivatives at two positions belong to different terms.
    independent, uncorrelated, _ = assumption_errors(rows, u.T @ u)
    assert independent.error == pytest.approx(uncorrelated.error)
