"""Every recognised loss function against a dense generalised Gauss-Newton matrix by autograd.

The seeds are back-propagated to the tensor z that a loss is made from. The matrix is JᵀHJ, J the derivative of the
loss function's input by z and H the Hessian of the loss by that input: with the data's targets where these do not enter
it, and else its expectation over targets drawn from the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.estimation.seeds import WeightedTerm, never_negative, seed_passes, weighted_terms
from lightning_kfc.losses.likelihoods import BernoulliProbability, Likelihood, Poisson, PoissonRate
from lightning_kfc.losses.recorder import LossRecorder
from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, double, observe
from tests.losses.test_terms import REDUCTIONS, finish, torch_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*NLLLoss2d.*:FutureWarning"),
]

Loss = Callable[[Tensor], Tensor]


def recorded(loss: Loss, at: Tensor) -> tuple[Tensor, Tensor, list[WeightedTerm]]:
    """The tensor that a loss is made from, the loss, and its terms."""
    leaf = at.detach().requires_grad_()
    recorder = LossRecorder()
    with recorder:
        value = loss(leaf * 1)
    assert recorder.failure is None, recorder.failure
    oracles.SOURCES[oracles.running_test()].update(term.function for term in recorder.terms)
    return leaf, value, weighted_terms(value, recorder.terms)


def back(seeds: list[Any], leaf: Tensor) -> Tensor:
    """Seeds at the leaf."""
    edges, values = [edge for edge, _ in seeds], [seed for _, seed in seeds]
    shaped = [v.reshape(edge.node._input_metadata[edge.output_nr].shape) for edge, v in zip(edges, values, strict=True)]
    (v,) = torch.autograd.grad(edges, [leaf], shaped, retain_graph=True, materialize_grads=True)
    return v.reshape(-1)


def exact_matrix(loss: Loss, at: Tensor) -> Tensor:
    """Σ v vᵀ of the exact seeds, averaged over all signs of two examples, whose products then cancel."""
    leaf, _, terms = recorded(loss, at)
    total = torch.zeros(leaf.numel(), leaf.numel(), dtype=leaf.dtype)
    for seeds in seed_passes(terms, "exact", torch.Generator().manual_seed(0)):
        v = back(seeds, leaf)
        total += torch.outer(v, v)
    return total * same_example(at)


def same_example(at: Tensor) -> Tensor:
    examples = at.shape[0] if at.ndim > 1 else 1
    owner = torch.arange(examples).repeat_interleave(at.numel() // examples)
    return (owner.unsqueeze(0) == owner.unsqueeze(1)).to(at.dtype)


def sampled_matrix(loss: Loss, at: Tensor, draws: int) -> Tensor:
    """The mean of v vᵀ over sampled seeds."""
    leaf, _, terms = recorded(loss, at)
    source = torch.Generator().manual_seed(1)
    passes = [next(seed_passes(terms, "mc", source)) for _ in range(draws)]
    drawn = torch.stack([torch.cat([seed.reshape(-1) for _, seed in seeds]) for seeds in passes])
    # Back-propagation is linear: that of each element of the seeds gives those of all draws.
    edges, sizes = [edge for edge, _ in passes[0]], [seed.numel() for _, seed in passes[0]]
    units = (torch.split(unit, sizes) for unit in torch.eye(sum(sizes), dtype=drawn.dtype))
    v = drawn @ torch.stack([back(list(zip(edges, unit, strict=True)), leaf) for unit in units])
    return v.T @ v / draws


def assert_matrix(loss: Loss, at: Tensor, expected: Tensor, *, rtol: float = 1e-9) -> None:
    found = exact_matrix(loss, at)
    assert float(expected.abs().max()) > 0
    error = float((found - expected).norm() / expected.norm())
    oracles.note_error(error)
    assert error <= rtol, f"relative error to the dense matrix {error:.3g}; {oracles.ratio(found, expected)}"


def hessian(loss: Loss, at: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracles.logits_hessian(loss, at)


def gauss_newton(inner: Loss, outer: Loss, at: Tensor) -> Tensor:
    """JᵀHJ of ``outer(inner(at))``."""
    J = oracles.jacobian(inner, at)
    return J.T @ hessian(outer, inner(at)) @ J


def quadratic(outer: Callable[[Tensor], Tensor], weights: Tensor, at: Tensor) -> Tensor:
    """The Hessian of ``outer`` of the elementwise terms ``weights * z² / 2``."""
    return hessian(lambda z: outer(weights * z.square() / 2), at)


# Losses of logits.


SHAPES = st.sampled_from([(4, 3), (3, 2, 2)])


@examples(40)
@given(shape=SHAPES, reduction=REDUCTIONS, size=st.sampled_from([1.0, 2.0]), as_module=st.booleans())
def test_soft_margin_loss(shape: tuple[int, ...], reduction: str, size: float, as_module: bool) -> None:
    y = size * (2 * classes(*shape, count=2).double() - 1)
    name = torch_name(reduction)

    def loss(z: Tensor) -> Tensor:
        value = nn.SoftMarginLoss(reduction=name)(z, y) if as_module else F.soft_margin_loss(z, y, reduction=name)
        return finish(value, reduction)

    assert_matrix(loss, data(*shape), hessian(loss, data(*shape)))


@examples(40)
@given(shape=SHAPES, reduction=REDUCTIONS, weighted=st.booleans(), soft=st.booleans(), as_module=st.booleans())
def test_multilabel_soft_margin_loss(
    shape: tuple[int, ...], reduction: str, weighted: bool, soft: bool, as_module: bool
) -> None:
    y = data(*shape, seed=6).sigmoid() if soft else classes(*shape, count=2).double()
    weight = data(shape[-1], seed=8).abs() if weighted else None
    options = {"weight": weight, "reduction": torch_name(reduction)}

    def loss(z: Tensor) -> Tensor:
        module = nn.MultiLabelSoftMarginLoss(**options)
        return finish(module(z, y) if as_module else F.multilabel_soft_margin_loss(z, y, **options), reduction)

    assert_matrix(loss, data(*shape), hessian(loss, data(*shape)))


def test_multilabel_soft_margin_loss_of_one_example() -> None:
    y = classes(3, count=2).double()
    found = exact_matrix(lambda z: F.multilabel_soft_margin_loss(z, y), data(3))
    expected = hessian(lambda z: F.multilabel_soft_margin_loss(z, y), data(3))
    oracles.assert_equal(found.diagonal(), expected.diagonal(), what="Fisher at the logits")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_target_does_not_enter_the_soft_margin_loss_fisher(sign: float) -> None:
    y = 2 * classes(4, 3, count=2).double() - 1
    assert_matrix(
        lambda z: F.soft_margin_loss(z, sign * y), data(4, 3), hessian(lambda z: F.soft_margin_loss(z, y), data(4, 3))
    )


# Categorical.


@examples(60)
@given(
    case=st.sampled_from([((4, 3), 1), ((4, 3), -1), ((2, 3, 2), 1), ((2, 4, 3), 2), ((2, 3, 2, 2), 1), ((3,), 0)]),
    reduction=st.sampled_from(
        ["mean", "sum", "batchmean", "none, then mean", "none, then sum", "none, then weighted by position"]
    ),
    log_target=st.booleans(),
    normalised=st.booleans(),
    as_module=st.booleans(),
)
def test_kl_div_of_log_softmax(
    case: tuple[tuple[int, ...], int], reduction: str, log_target: bool, normalised: bool, as_module: bool
) -> None:
    shape, axis = case
    y = data(*shape, seed=4).softmax(axis) * (1 if normalised else 1.7)
    y = y.log() if log_target else y
    options = {"reduction": torch_name(reduction), "log_target": log_target}
    factors = data(*shape, seed=7).abs()

    def loss(z: Tensor) -> Tensor:
        log_p = z.log_softmax(axis)
        value = nn.KLDivLoss(**options)(log_p, y) if as_module else F.kl_div(log_p, y, **options)
        return (value * factors).sum() if reduction.endswith("position") else finish(value, reduction)

    # The loss is linear in log-probabilities: its Hessian by the logits is all log_softmax's own, as of cross_entropy.
    assert_matrix(loss, data(*shape), hessian(loss, data(*shape)))


def test_kl_div_with_a_target_for_all_examples_and_with_classes_of_probability_zero() -> None:
    y, z = torch.tensor([0.0, 0.3, 0.7]).double(), data(4, 3)
    for loss in (
        lambda z: F.kl_div(z.log_softmax(1), y, reduction="batchmean"),
        lambda z: F.kl_div(z.softmax(1).log(), y.expand(4, 3), reduction="sum"),
    ):
        assert_matrix(loss, z, hessian(loss, z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_probabilities_are_known_as_such_in_half_precision(dtype: torch.dtype) -> None:
    z, y = (3 * data(16, 50)).to(dtype), data(16, 50, seed=4).softmax(1).to(dtype)
    _, _, terms = recorded(lambda z: F.kl_div(z.log_softmax(1), y, reduction="batchmean"), z)
    assert [weighted.term.logits.shape for weighted in terms] == [(16, 50)]


def test_kl_div_of_what_are_no_log_probabilities_is_not_recognised() -> None:
    y = data(4, 3, seed=4).softmax(1)
    for loss in (
        lambda z: F.kl_div(z, y, reduction="sum"),
        lambda z: F.kl_div(z[:0], y[:0], reduction="sum"),
        lambda z: F.kl_div(z.log_softmax(1) + torch.nan, y, reduction="sum"),
    ):
        assert recorded(loss, data(4, 3))[2] == []


@examples(30)
@given(
    shape=st.sampled_from([(3,), (4, 3), (2, 3, 2), (2, 3, 2, 2), (1, 3, 1, 2, 2)]),
    reduction=REDUCTIONS,
    weighted=st.booleans(),
    ignore_index=st.sampled_from([-100, 1]),
    old=st.booleans(),
)
def test_nll_loss_in_all_its_forms(
    shape: tuple[int, ...], reduction: str, weighted: bool, ignore_index: int, old: bool
) -> None:
    target = classes(*(() if len(shape) == 1 else (shape[0], *shape[2:])), count=3)
    if target.ndim:
        target.view(-1)[:1], target.view(-1)[1:2] = ignore_index, 2
    else:
        ignore_index = -100
    options = {
        "weight": torch.tensor([0.5, 1.0, 3.0]).double() if weighted else None,
        "ignore_index": ignore_index,
        "reduction": torch_name(reduction),
    }

    def loss(z: Tensor) -> Tensor:
        log_p = z.log_softmax(0 if z.ndim == 1 else 1)
        value = nn.NLLLoss2d(**options)(log_p, target) if old else F.nll_loss(log_p, target, **options)
        return finish(value, reduction)

    assert_matrix(loss, data(*shape), hessian(loss, data(*shape)))


# Probabilities, rates and variances: the expected Hessian. The target that is linear in it is put at its mean.


@examples(40)
@given(
    shape=SHAPES,
    reduction=REDUCTIONS,
    weight=st.sampled_from([None, "full", "an output", "an example"]),
    as_module=st.booleans(),
)
def test_binary_cross_entropy_of_probabilities(
    shape: tuple[int, ...], reduction: str, weight: str | None, as_module: bool
) -> None:
    y = classes(*shape, count=2).double()
    own = {
        None: None,
        "full": data(*shape, seed=8).abs(),
        "an output": data(shape[-1], seed=8).abs(),
        "an example": data(shape[0], *[1] * (len(shape) - 1), seed=8).abs(),
    }[weight]
    options = {"weight": own, "reduction": torch_name(reduction)}

    def of(p: Tensor, y: Tensor) -> Tensor:
        value = nn.BCELoss(**options)(p, y) if as_module else F.binary_cross_entropy(p, y, **options)
        return finish(value, reduction)

    p = data(*shape).sigmoid()
    assert_matrix(lambda z: of(z, y), p, hessian(lambda z: of(z, p), p))
    z = 3 * data(*shape)
    expected = gauss_newton(torch.sigmoid, lambda p: of(p, z.sigmoid()), z)
    assert_matrix(lambda z: of(z.sigmoid(), y), z, expected)


def test_binary_cross_entropy_of_a_sigmoid_is_that_of_its_logits() -> None:
    y, z = classes(4, 3, count=2).double(), 5 * data(4, 3)
    expected = hessian(lambda z: F.binary_cross_entropy_with_logits(z, y), z)
    assert_matrix(lambda z: F.binary_cross_entropy(z.sigmoid(), y), z, expected, rtol=1e-8)


@examples(40)
@given(
    shape=SHAPES,
    reduction=REDUCTIONS,
    log_input=st.booleans(),
    full=st.booleans(),
    eps=st.sampled_from([1e-8, 0.5]),
    as_module=st.booleans(),
)
def test_poisson_nll_loss(
    shape: tuple[int, ...], reduction: str, log_input: bool, full: bool, eps: float, as_module: bool
) -> None:
    y = 4 * data(*shape, seed=4).abs()
    options = {"log_input": log_input, "full": full, "eps": eps, "reduction": torch_name(reduction)}

    def of(z: Tensor, y: Tensor) -> Tensor:
        value = nn.PoissonNLLLoss(**options)(z, y) if as_module else F.poisson_nll_loss(z, y, **options)
        return finish(value, reduction)

    z = data(*shape) if log_input else data(*shape).exp()
    mean = z.exp() if log_input else z + eps
    assert_matrix(lambda z: of(z, y), z, hessian(lambda z: of(z, mean), z))


def variances_of(form: str, shape: tuple[int, ...]) -> Tensor:
    forms = {
        "full": shape,
        "one an example": (*shape[:-1], 1),
        "one an example, without the axis": shape[:-1],
        "below eps": shape,
    }
    size = 1e-3 if form == "below eps" else 1.0
    return size * data(*forms[form], seed=8).exp()


@examples(60)
@given(
    shape=SHAPES,
    reduction=REDUCTIONS,
    form=st.sampled_from(["full", "one an example", "one an example, without the axis", "below eps"]),
    learnt=st.booleans(),
    swapped=st.booleans(),
    full=st.booleans(),
    as_module=st.booleans(),
)
def test_gaussian_nll_loss(
    shape: tuple[int, ...], reduction: str, form: str, learnt: bool, swapped: bool, full: bool, as_module: bool
) -> None:
    given_variance, y = variances_of(form, shape), data(*shape, seed=5)
    options = {"full": full, "eps": 0.1, "reduction": torch_name(reduction)}
    mean, count = data(*shape), data(*shape).numel()

    def of(z: Tensor, y: Tensor) -> Tensor:
        # One vector of means and, where they are learnt, of variances.
        mu, var = z[:count].reshape(shape), z[count:].reshape(given_variance.shape) if learnt else given_variance
        pair = (y, mu) if swapped else (mu, y)
        value = nn.GaussianNLLLoss(**options)(*pair, var) if as_module else F.gaussian_nll_loss(*pair, var, **options)
        return finish(value, reduction)

    z = torch.cat([mean.reshape(-1), given_variance.reshape(-1)]) if learnt else mean.reshape(-1)
    clamped = given_variance.clamp_min(0.1)
    clamped = clamped.unsqueeze(-1) if clamped.shape == shape[:-1] else clamped
    # Targets one standard deviation above and below have the first two moments of those that the model draws.
    above, below = (mean + sign * clamped.sqrt() for sign in (1, -1))
    expected = (hessian(lambda z: of(z, above), z) + hessian(lambda z: of(z, below), z)) / 2
    leaf, _, terms = recorded(lambda z: of(z, y), z)
    assert [weighted.term.logits.ndim for weighted in terms] == [len(shape)] * (2 if learnt else 1)
    diagonal = torch.zeros_like(leaf).detach()
    for seeds in seed_passes(terms, "exact", torch.Generator().manual_seed(0)):
        diagonal += back(seeds, leaf).square()
    error = float((torch.diag(diagonal) - expected).norm() / expected.norm())
    oracles.note_error(error)
    assert error < 1e-9, f"relative error to the dense matrix {error:.3g}"


def test_gaussian_nll_loss_takes_a_number_as_variance() -> None:
    y = data(4, 3, seed=5)
    try:
        expected = hessian(lambda z: F.gaussian_nll_loss(z, y, 0.3), data(4, 3))
    except (TypeError, AttributeError):
        pytest.skip("this torch takes tensors alone")
    assert_matrix(lambda z: F.gaussian_nll_loss(z, y, 0.3), data(4, 3), expected)


# Robust losses: the law of reweighting, rho'(r)/r, which autograd gives as the gradient of the terms over the residual.


def reweighted(terms: Callable[[Tensor], Tensor], at: Tensor, y: Tensor) -> Tensor:
    z = at.detach().requires_grad_()
    (slope,) = torch.autograd.grad(terms(z).sum(), z)
    return slope / (at - y)


@examples(60)
@given(
    shape=SHAPES,
    reduction=REDUCTIONS,
    zone=st.sampled_from([0.05, 1.0, 100.0]),
    function=st.sampled_from(["huber_loss", "smooth_l1_loss"]),
    swapped=st.booleans(),
    as_module=st.booleans(),
)
def test_huber_and_smooth_l1_loss_are_reweighted_squares(
    shape: tuple[int, ...], reduction: str, zone: float, function: str, swapped: bool, as_module: bool
) -> None:
    y, z = data(*shape, seed=5), data(*shape)
    name = torch_name(reduction)
    module, option = {"huber_loss": (nn.HuberLoss, "delta"), "smooth_l1_loss": (nn.SmoothL1Loss, "beta")}[function]

    def terms(z: Tensor, how: str = "none") -> Tensor:
        pair = (y, z) if swapped else (z, y)
        options = {"reduction": how, option: zone}
        return module(**options)(*pair) if as_module else getattr(F, function)(*pair, **options)

    def loss(z: Tensor) -> Tensor:
        return finish(terms(z, name), reduction)

    def outer(unreduced: Tensor) -> Tensor:
        return finish({"mean": torch.mean, "sum": torch.sum, "none": lambda t: t}[name](unreduced), reduction)

    assert_matrix(loss, z, quadratic(outer, reweighted(terms, z, y), z))
    if zone == 100:
        assert_matrix(loss, z, hessian(loss, z))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_huber_loss_with_weights(reduction: str) -> None:
    y, z, weight = data(4, 3, seed=5), data(4, 3), data(4, 3, seed=8).abs()
    curvature = reweighted(lambda z: F.huber_loss(z, y, reduction="none", delta=0.5), z, y)
    expected = quadratic(lambda t: (weight * t).mean() if reduction == "mean" else (weight * t).sum(), curvature, z)
    assert_matrix(lambda z: F.huber_loss(z, y, reduction=reduction, delta=0.5, weight=weight).sum(), z, expected)


@pytest.mark.parametrize("unbounded", ["l1_loss", "L1Loss", "smooth_l1_loss of beta 0"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_l1_loss_has_the_curvature_of_a_huber_loss_up_to_the_mean(unbounded: str, reduction: str) -> None:
    y, z = data(4, 3, seed=5), data(4, 3)
    y[0, 0] = z[0, 0]  # A residual of 0.
    call: dict[str, Loss] = {
        "l1_loss": lambda z: F.l1_loss(z, y, reduction=reduction),
        "L1Loss": lambda z: nn.L1Loss(reduction=reduction)(z, y),
        "smooth_l1_loss of beta 0": lambda z: F.smooth_l1_loss(z, y, reduction=reduction, beta=0.0),
    }
    mean = float((z - y).abs().mean())

    def huber(z: Tensor) -> Tensor:
        return F.huber_loss(z, y, reduction="mean" if reduction == "mean" else "sum", delta=mean) / mean

    assert_matrix(lambda z: call[unbounded](z).sum(), z, hessian(huber, z))


def test_the_mean_curvature_of_an_l1_loss_is_near_that_of_the_expected_loss() -> None:
    # Twice the density at 0: of a uniform density, exactly; of Gauss's, 10 % less; of Laplace's, a third less.
    z = torch.zeros(100_000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    uniform = 2 * torch.rand(len(z), generator=generator, dtype=z.dtype) - 1
    normal = torch.randn(len(z), generator=generator, dtype=z.dtype)
    laplace = -uniform.sign() * (1 - uniform.abs()).log()
    expected = {"uniform": (uniform, 1.0), "normal": (normal, 0.8 * 0.9), "laplace": (laplace, 1.0 * 0.632)}
    for name, (y, curvature) in expected.items():
        _, _, terms = recorded(lambda z, y=y: F.l1_loss(z, y, reduction="sum"), z)
        found = float(2 * terms[0].weights.double().mean())
        assert found == pytest.approx(curvature, rel=0.02), name


def test_equal_residuals_have_the_curvature_of_their_size() -> None:
    # The mean of nine numbers 0.7 is rounded to less than 0.7 in some orders of summation.
    for count in range(1, 40):
        z = torch.full((count,), 0.7, dtype=torch.float32)
        _, _, terms = recorded(lambda z: F.l1_loss(z, torch.zeros_like(z), reduction="sum"), z)
        assert torch.allclose(2 * terms[0].weights, torch.full_like(z, 1 / 0.7)), count


@pytest.mark.parametrize("units", [1e-6, 1.0, 1e6])
def test_the_curvature_of_an_l1_loss_has_no_units(units: float) -> None:
    # Of residuals in other units, the loss grows as they do, and the Fisher by the old outputs with it.
    y, z = data(4, 3, seed=5), data(4, 3)
    expected = units * exact_matrix(lambda z: F.l1_loss(z, y), z)
    assert_matrix(lambda z: F.l1_loss(units * z, units * y), z, expected)


def test_an_l1_loss_without_residuals_has_no_curvature() -> None:
    z = data(4, 3)
    assert not bool(exact_matrix(lambda t: F.l1_loss(t, z), z).any())
    _, _, terms = recorded(lambda z: F.l1_loss(z[:0], z[:0].detach(), reduction="sum"), z)
    assert terms[0].weights.numel() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_weights_of_an_l1_loss_count_although_torch_does_not_pass_them_on(reduction: str) -> None:
    y, z, weight = data(4, 3, seed=5), data(4, 3), data(4, 3, seed=8).abs()

    def loss(z: Tensor) -> Tensor:
        return F.l1_loss(z, y, reduction=reduction, weight=weight).sum()

    _, value, _ = recorded(loss, z)
    oracles.assert_equal(value, loss(z), what="the loss while it is watched")
    residuals = (z - y).abs()
    total = weight / weight.sum() if reduction == "mean" else weight
    assert_matrix(loss, z, quadratic(lambda t: (total * t).sum(), within_the_mean(residuals), z))


def within_the_mean(residuals: Tensor) -> Tensor:
    """1 / mean for residuals up to the mean, and 0 for others."""
    return (residuals <= residuals.mean()) / residuals.mean()


ROBUST = [F.l1_loss, F.smooth_l1_loss, F.huber_loss]


@pytest.mark.parametrize("function", ROBUST)
@pytest.mark.parametrize(("prediction", "target"), [((3, 1), (3, 4)), ((3, 2), (2,)), ((3, 2), (4, 3, 2))])
def test_robust_losses_that_broadcast_add_up_their_terms(
    function: Callable[..., Tensor], prediction: tuple[int, ...], target: tuple[int, ...]
) -> None:
    y, z = data(*target, seed=5), data(*prediction)
    expanded = z + torch.zeros_like(y)
    residuals = (expanded - y).abs()
    curvature = within_the_mean(residuals) if function is F.l1_loss else 1 / residuals.clamp_min(1)
    expected = hessian(lambda z: (curvature * (z - y).square() / 2).mean(), z)
    assert_matrix(lambda z: function(z, y), z, expected)


@pytest.mark.parametrize("function", ROBUST)
def test_robust_losses_between_two_predictions_see_both(function: Callable[..., Tensor]) -> None:
    z = data(4, 6)
    residuals = (z[:, :3] - z[:, 3:]).abs()
    curvature = within_the_mean(residuals) if function is F.l1_loss else 1 / residuals.clamp_min(1)
    expected = hessian(lambda z: (curvature * (z[:, :3] - z[:, 3:]).square() / 2).mean(), z)
    assert_matrix(lambda z: function(z[:, :3], z[:, 3:]), z, expected)


def test_an_l1_loss_of_complex_numbers_is_not_recognised() -> None:
    assert recorded(lambda z: F.l1_loss(torch.fft.fft(z), torch.ones(4, 3).to(torch.complex128)), data(4, 3))[2] == []


# All of them.


B, P = classes(4, 3, count=2).double(), data(4, 3, seed=6).softmax(1)
Y, COUNTS = data(4, 3, seed=5), classes(4, 3, count=5).double()

LOSSES: dict[str, Loss] = {
    "binary_cross_entropy": lambda z: F.binary_cross_entropy(z.sigmoid(), B),
    "soft_margin_loss": lambda z: F.soft_margin_loss(z, 2 * B - 1),
    "multilabel_soft_margin_loss": lambda z: F.multilabel_soft_margin_loss(z, B),
    "l1_loss": lambda z: F.l1_loss(z, Y),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z, Y),
    "huber_loss": lambda z: F.huber_loss(z, Y, delta=0.5),
    "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(z, Y, z.exp()),
    "poisson_nll_loss": lambda z: F.poisson_nll_loss(z, COUNTS),
    "poisson_nll_loss of rates": lambda z: F.poisson_nll_loss(z.exp(), COUNTS, log_input=False),
    "kl_div": lambda z: F.kl_div(z.log_softmax(1), P, reduction="batchmean"),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(1), classes(4, count=3)),
}


@pytest.mark.parametrize("case", LOSSES)
def test_sampled_seeds_have_the_second_moment_of_the_exact_ones(case: str) -> None:
    z = data(4, 3)
    expected, draws = exact_matrix(LOSSES[case], z), 4000
    found = sampled_matrix(LOSSES[case], z, draws)
    error = float((found - expected).norm() / expected.norm())
    # n outputs' products have a relative error of about √(n/draws) in this norm: 12 outputs, heavy tails allowed for.
    assert error < 3 * (12 / draws) ** 0.5, f"relative error to the exact matrix {error:.3g}"


@pytest.mark.parametrize("case", [case for case in LOSSES if case not in ("kl_div", "nll_loss", "gaussian_nll_loss")])
def test_empirical_seeds_are_the_gradients_of_the_terms(case: str) -> None:
    # Of terms with one output each and weight 1, they are ± the loss's own gradient, whatever its curvature.
    z = data(4, 3)
    leaf, value, terms = recorded(lambda z: 12 * LOSSES[case](z), z)
    (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
    v = back(next(seed_passes(terms, "empirical", torch.Generator().manual_seed(0))), leaf)
    oracles.assert_equal(v.abs(), gradient.reshape(-1).abs(), what="empirical seeds")


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_a_model_trains_with_it_without_a_word(case: str, fisher: str) -> None:
    # Warnings are errors here.
    model = double(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    kfc = observe(model, lambda: LOSSES[case](model(data(4, 5))), fisher=fisher)
    assert kfc.events.unrecognised_losses == 0
    assert all(bool(torch.isfinite(layer.G).all()) and bool(layer.G.any()) for layer in kfc.layers.values())


ONE: dict[str, Loss] = {
    "binary_cross_entropy": lambda z: F.binary_cross_entropy(z.sigmoid(), B[:1]),
    "kl_div": lambda z: F.kl_div(z.log_softmax(1), P[:1], reduction="batchmean"),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(1), classes(1, count=3)),
    "poisson_nll_loss": lambda z: F.poisson_nll_loss(z, COUNTS[:1]),
    "soft_margin_loss": lambda z: F.soft_margin_loss(z, 2 * B[:1] - 1),
    "multilabel_soft_margin_loss": lambda z: F.multilabel_soft_margin_loss(z, B[:1]),
}


@pytest.mark.parametrize("case", ONE)
def test_a_last_layer_has_the_dense_fisher_of_the_loss(case: str) -> None:
    # One example: the Kronecker product of one row is exact.
    x, model = data(1, 4), double(nn.Linear(4, 3, bias=False))
    layer = observe(model, lambda: ONE[case](model(x))).layers["0"]
    # Of a sigmoid, the Hessian of the logits is the expected one whatever the target.
    found, expected = torch.kron(layer.G, layer.A), oracles.dense_fisher(model, x, ONE[case], "0")
    error = float((found - expected).norm() / expected.norm())
    oracles.note_error(error)
    assert error < 1e-9, f"relative error to the dense matrix {error:.3g}; {oracles.ratio(found, expected)}"


@pytest.mark.parametrize(
    ("case", "expected"),
    [(case, not case.startswith(("gaussian_nll", "poisson_nll"))) for case in LOSSES],
)
def test_likelihoods_of_densities_and_of_counts_without_their_constants_have_no_bound(
    case: str, expected: bool
) -> None:
    _, value, terms = recorded(LOSSES[case], data(4, 3))
    assert never_negative(value, terms, 1.0) == expected


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (False, True), (None, False)])
def test_the_two_deprecated_reduction_arguments(size_average: bool | None, reduce: bool | None) -> None:
    old = {"size_average": size_average, "reduce": reduce}
    new = {"reduction": "none" if reduce is False else "sum" if size_average is False else "mean"}
    losses: list[Callable[[Tensor, dict[str, Any]], Tensor]] = [
        lambda z, how: F.binary_cross_entropy(z.sigmoid(), B, **how),
        lambda z, how: F.soft_margin_loss(z, 2 * B - 1, **how),
        lambda z, how: F.multilabel_soft_margin_loss(z, B, **how),
        lambda z, how: F.l1_loss(z, Y, **how),
        lambda z, how: F.smooth_l1_loss(z, Y, **how),
        lambda z, how: F.poisson_nll_loss(z, COUNTS, **how),
        lambda z, how: F.kl_div(z.log_softmax(1), P, **how),
    ]
    for loss in losses:
        expected = exact_matrix(lambda z, loss=loss: loss(z, new).sum(), data(4, 3))
        assert_matrix(lambda z, loss=loss: loss(z, old).sum(), data(4, 3), expected)


# Likelihoods by themselves.


@pytest.mark.parametrize(
    ("likelihood", "logits", "information"),
    [
        (BernoulliProbability(), data(5, 3).sigmoid(), lambda p: 1 / (p * (1 - p))),
        (Poisson(), data(5, 3), torch.exp),
        (PoissonRate(), data(5, 3).exp(), lambda rate: 1 / rate),
    ],
    ids=["probability", "log-rate", "rate"],
)
def test_squares_of_seeds_are_the_fisher_information(
    likelihood: Likelihood, logits: Tensor, information: Callable[[Tensor], Tensor]
) -> None:
    c = data(5, 3, seed=3).abs()
    c[0] = 0
    source = torch.Generator().manual_seed(0)
    expected = c * information(logits)
    oracles.assert_equal(likelihood.sampled_seed(logits, c, source).square(), expected, what="sampled")
    exact = torch.stack(list(likelihood.exact_seeds(logits, c, source)))
    oracles.assert_equal(exact.square().sum(0), expected, what="exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_next_to_the_ends_are_finite_and_zero_at_them(dtype: torch.dtype) -> None:
    p = torch.tensor([[0.0, 1.0, 1e-30, 1e-12, 1 - 2**-24]], dtype=dtype)
    seed = BernoulliProbability().sampled_seed(p, torch.ones_like(p), torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(seed).all())
    assert not bool(seed[0, :2].any())
    assert float(seed.abs().max()) <= 1.001e6
    rate = PoissonRate().sampled_seed(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2, dtype=dtype), torch.Generator())
    assert not bool(rate.any())


def test_a_gaussian_term_of_one_output_needs_no_monte_carlo() -> None:
    model = double(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = data(6, 5), data(6, 1, seed=5)
    for function in (F.mse_loss, F.huber_loss, F.l1_loss):
        exact, sampled = (
            observe(model, lambda f=function: f(model(x), y), fisher=fisher).layers for fisher in ("exact", "mc")
        )
        for name, layer in exact.items():
            oracles.assert_equal(sampled[name].G, layer.G, what=f"G of {name}")
