"""Scale (KFC.md sec. 5): where the approximation is exact, A ⊗ G equals the dense Fisher block, factor for factor."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, double, observe

Loss = Callable[[Tensor], Tensor]


def assert_factors_equal_the_dense_fisher(
    model: nn.Module, x: Tensor, loss: Loss, layers: list[str], **settings_: str
) -> None:
    """A ⊗ G of every layer equals its block of the dense Fisher matrix."""
    kfc = observe(model, lambda: loss(model(x)), **settings_)
    for name in layers:
        layer = kfc.layers[name]
        expected = oracles.dense_fisher(model, x, loss, name)
        assert float(expected.abs().max()) > 0
        oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what=f"A⊗G of {name}")


def reduced(loss: Callable[..., Tensor], target: Tensor, reduction: str) -> Loss:
    """A loss with one of torch's reductions; without one, the user's own weighted sum."""
    if reduction != "none":
        return lambda z: loss(z, target, reduction=reduction)

    def weighted(z: Tensor) -> Tensor:
        terms = loss(z, target, reduction="none")
        return (terms * torch.linspace(0.2, 1.1, terms.numel(), dtype=terms.dtype).reshape(terms.shape)).sum()

    return weighted


def losses_on(outputs: int, examples: int, likelihood: str, reduction: str) -> Loss:
    """A loss of each likelihood on (examples, outputs)."""
    if likelihood == "categorical":
        return reduced(F.cross_entropy, classes(examples, count=outputs), reduction)
    if likelihood == "bernoulli":
        target = classes(examples, outputs, count=2).double()
        return reduced(F.binary_cross_entropy_with_logits, target, reduction)
    return reduced(F.mse_loss, data(examples, outputs, seed=5), reduction)


LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_one_example_and_one_location_is_exact_for_every_layer_and_likelihood(likelihood: str, reduction: str) -> None:
    # Case (i): a kernel as large as its input has one location; so has a Linear on (1, d).
    model = double(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    loss = losses_on(3, 1, likelihood, reduction)
    assert_factors_equal_the_dense_fisher(model, data(1, 2, 3, 3), loss, ["0", "3", "5"])


@examples(15)
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    bias=st.booleans(),
    likelihood=st.sampled_from(LIKELIHOODS),
    factor=st.sampled_from([1.0, 0.25, 7.0]),
)
def test_one_example_is_exact_whatever_the_widths_and_the_factor_on_the_loss(
    widths: list[int], bias: bool, likelihood: str, factor: float
) -> None:
    if likelihood == "categorical" and widths[-1] == 1:
        widths[-1] = 2  # one class has no information
    pairs = list(itertools.pairwise(widths))
    model = double(*[m for a, b in pairs for m in (nn.Linear(a, b, bias=bias), nn.Tanh())][:-1])
    loss = losses_on(widths[-1], 1, likelihood, "mean")
    names = [str(2 * i) for i in range(len(pairs))]
    assert_factors_equal_the_dense_fisher(model, data(1, widths[0]), lambda z: factor * loss(z), names)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("examples", [1, 5])
def test_a_deep_linear_net_with_squared_error_is_exact_for_any_number_of_examples(
    examples: int, reduction: str
) -> None:
    # Case (i), second half.
    model = double(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
    loss = losses_on(3, examples, "gaussian", reduction)
    assert_factors_equal_the_dense_fisher(model, data(examples, 3), loss, ["0", "1", "2"])


@pytest.mark.parametrize("sequence_first", [False, True], ids=["(N, S, d)", "(S, N, d)"])
def test_a_linear_net_on_sequences_with_squared_error_is_exact_wherever_the_batch_axis_is(sequence_first: bool) -> None:
    # The law that needs neither N nor |T|: every position is a row, whatever axis it lies on. The exact seeds
    # travel once per position of the first axis's examples, so both layouts must give the same numbers.
    model = double(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = data(4, 3, 3), data(4, 3, 2, seed=4)
    if sequence_first:
        x, y = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
    assert_factors_equal_the_dense_fisher(model, x, lambda z: F.mse_loss(z, y), ["0", "1"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(2, 3, 2),
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.Conv2d(2, 3, 2, stride=2, padding=1, dilation=2),
    ],
    ids=["plain", "padded", "strided"],
)
def test_a_convolution_followed_by_one_by_one_convolutions_with_squared_error_is_exact(
    first: nn.Conv2d, reduction: str
) -> None:
    # Case (ii): expand.
    model = double(first, nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1, bias=False))
    x = data(3, 2, 5, 5)
    y = data(*model(x).shape, seed=7)
    assert_factors_equal_the_dense_fisher(model, x, lambda z: F.mse_loss(z, y, reduction=reduction), ["0", "1", "2"])


class OverSpace(nn.Module):
    """Sum or mean over all locations."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return flat.sum(2) if self.how == "sum" else flat.mean(2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_then_a_sum_or_mean_over_space_is_exact_with_reduce(how: str, reduction: str, bias: bool) -> None:
    # Case (iii).
    model = double(nn.Conv2d(2, 3, 2, bias=bias), OverSpace(how))
    loss = losses_on(3, 4, "gaussian", reduction)
    assert_factors_equal_the_dense_fisher(model, data(4, 2, 4, 4), loss, ["0"], weight_sharing="reduce")


def test_a_linear_on_sequences_then_a_mean_over_them_is_exact_with_reduce() -> None:
    # Case (iii) for a Linear (Eschenhagen et al. 2023, arXiv:2311.00636, sec. 3.2).
    class MeanOverPositions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    model = double(nn.Linear(3, 2), MeanOverPositions())
    loss = losses_on(2, 4, "gaussian", "mean")
    assert_factors_equal_the_dense_fisher(model, data(4, 5, 3), loss, ["0"], weight_sharing="reduce")


def test_expand_and_reduce_are_different_matrices() -> None:
    model = double(nn.Conv2d(2, 3, 2), OverSpace("sum"))
    x, loss = data(4, 2, 4, 4), losses_on(3, 4, "gaussian", "mean")
    expand, reduce = (
        observe(model, lambda: loss(model(x)), weight_sharing=how).layers["0"] for how in ("expand", "reduce")
    )
    difference = oracles.kron(expand.A, expand.G) - oracles.kron(reduce.A, reduce.G)
    assert float(difference.norm() / oracles.kron(reduce.A, reduce.G).norm()) > 0.1


def test_output_factor_is_the_weighted_sum_of_each_location_s_own_second_moment() -> None:
    # E2 where A ⊗ G is an approximation: a nonlinear net, per-location logits with unequal weights.
    model = double(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))
    x, target = data(2, 1, 3, 3), classes(2, 2, 2, count=3)
    target[0, 0, 0] = -100
    weight = torch.tensor([0.5, 1.0, 2.0]).double()

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target, weight=weight)

    kfc = observe(model, lambda: loss(model(x)))
    hessian = oracles.logits_hessian(loss, model(x))
    hidden = model[0](x).detach()
    jacobian = oracles.jacobian(lambda h: model[2](model[1](h)), hidden)
    # Rows and columns by (example, channel, location): each location's block is a row's own product.
    full = (jacobian.T @ hessian @ jacobian).reshape(2, 2, 4, 2, 2, 4)
    own = torch.einsum("nctndt->cd", full)
    oracles.assert_equal(kfc.layers["0"].G, own, what="G")
