"""``log_prob`` of torch's distributions against dense Fisher matrices: expectations of squared scores, by quadrature.

The matrix of a loss is the weighted sum over examples of E[s sᵀ], s the derivative of the log-probability by the tensor
that the distribution is made from, and the expectation one over all values (or nodes of a quadrature) under the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from lightning_kfc.estimation.seeds import never_negative
from lightning_kfc.losses.readers.distributions import DISTRIBUTIONS
from lightning_kfc.losses.recorder import LossRecorder
from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, observe, train_step
from tests.losses.test_loss_functions import assert_matrix, exact_matrix, recorded, sampled_matrix

Make = Callable[[Tensor], distributions.Distribution]


def counts(most: int) -> Callable[[distributions.Distribution], tuple[Tensor, Tensor]]:
    """All values from 0 on, with their probabilities."""

    def nodes(distribution: distributions.Distribution) -> tuple[Tensor, Tensor]:
        values = torch.arange(most + 1).double()
        return values, distribution.log_prob(values).exp()

    return nodes


def numbers(count: int = 40_000) -> Callable[[distributions.Distribution], tuple[Tensor, Tensor]]:
    """Midpoints of (0, 1), as tangents around the location: exact to the square of the distance between them."""

    def nodes(distribution: distributions.Distribution) -> tuple[Tensor, Tensor]:
        u = math.pi * ((torch.arange(count).double() + 0.5) / count - 0.5)
        location, scale = getattr(distribution, "loc", torch.zeros(())), getattr(distribution, "scale", torch.ones(()))
        values = location + scale * u.tan()
        inside = distribution.support.check(values)
        values = values[inside]
        return values, distribution.log_prob(values).exp() * (scale / u.cos()[inside].square() * math.pi / count)

    return nodes


def one_hot(count: int) -> Callable[[distributions.Distribution], tuple[Tensor, Tensor]]:
    def nodes(distribution: distributions.Distribution) -> tuple[Tensor, Tensor]:
        values = torch.eye(count).double()
        return values, distribution.log_prob(values).exp()

    return nodes


def gauss_hermite(distribution: distributions.Distribution) -> tuple[Tensor, Tensor]:
    """Nodes of a quadrature that is exact for polynomials of a degree up to 9 in each of two dimensions."""
    import numpy as np

    x, w = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(5))
    grid, weights = torch.cartesian_prod(x, x), torch.cartesian_prod(w, w).prod(1) / (2 * math.pi)
    return distribution.mean + grid @ distribution.scale_tril.mT, weights


def between_0_and_1(distribution: distributions.Distribution) -> tuple[Tensor, Tensor]:
    """Midpoints of (0, 1)."""
    values = (torch.arange(40_000).double() + 0.5) / 40_000
    return values, distribution.log_prob(values).exp() / 40_000


def shares(distribution: distributions.Distribution) -> tuple[Tensor, Tensor]:
    """Midpoints of one share, and the other; the density is that of the first share."""
    values = (torch.arange(40_000).double() + 0.5) / 40_000
    both = torch.stack([values, 1 - values], -1)
    return both, distribution.log_prob(both).exp() / 40_000


def lower(z: Tensor) -> Tensor:
    """A lower triangle with a positive diagonal, from three numbers."""
    zero = torch.zeros_like(z[..., 0])
    rows = [torch.stack([z[..., 0].exp(), zero], -1), torch.stack([z[..., 1], z[..., 2].exp()], -1)]
    return torch.stack(rows, -2)


D = distributions
CASES: dict[str, tuple[Make, int, Callable[[distributions.Distribution], tuple[Tensor, Tensor]], float]] = {
    "Categorical(logits)": (lambda z: D.Categorical(logits=z), 4, counts(3), 1e-9),
    "Categorical(probs)": (lambda z: D.Categorical(probs=z.softmax(-1)), 4, counts(3), 1e-6),
    "OneHotCategorical": (lambda z: D.OneHotCategorical(logits=z), 3, one_hot(3), 1e-9),
    "Bernoulli(logits)": (lambda z: D.Bernoulli(logits=z[..., 0]), 1, counts(1), 1e-9),
    "Bernoulli(probs)": (lambda z: D.Bernoulli(probs=z[..., 0].sigmoid()), 1, counts(1), 1e-6),
    "Binomial": (lambda z: D.Binomial(torch.tensor(7.0).double(), logits=z[..., 0]), 1, counts(7), 1e-9),
    "Poisson": (lambda z: D.Poisson(z[..., 0].exp()), 1, counts(80), 1e-9),
    "Exponential": (lambda z: D.Exponential(z[..., 0].exp()), 1, numbers(), 1e-6),
    "Normal": (lambda z: D.Normal(z[..., 0], z[..., 1].exp()), 2, numbers(), 1e-6),
    "Normal of a given scale": (lambda z: D.Normal(z[..., 0] * z[..., 1], 0.3), 2, numbers(), 1e-6),
    "Normal of a given mean": (lambda z: D.Normal(0.5, z[..., 0].exp()), 1, numbers(), 1e-6),
    "LogNormal": (lambda z: D.LogNormal(z[..., 0], z[..., 1].exp() / 4), 2, numbers(400_000), 1e-4),
    "Laplace": (lambda z: D.Laplace(z[..., 0], z[..., 1].exp()), 2, numbers(), 1e-4),
    "Cauchy": (lambda z: D.Cauchy(z[..., 0], z[..., 1].exp()), 2, numbers(), 1e-6),
    "StudentT": (lambda z: D.StudentT(3.0, z[..., 0], z[..., 1].exp()), 2, numbers(), 1e-6),
    "MultivariateNormal(scale_tril)": (
        lambda z: D.MultivariateNormal(z[..., :2], scale_tril=lower(z[..., 2:])),
        5,
        gauss_hermite,
        1e-8,
    ),
    "MultivariateNormal(covariance_matrix)": (
        lambda z: D.MultivariateNormal(z[..., :2], lower(z[..., 2:]) @ lower(z[..., 2:]).mT),
        5,
        gauss_hermite,
        1e-8,
    ),
    "Gamma": (lambda z: D.Gamma(z[..., 0].exp() + 2, z[..., 1].exp()), 2, numbers(400_000), 1e-5),
    "Gamma of a given rate": (lambda z: D.Gamma(z[..., 0].exp() + 2, 0.5), 1, numbers(400_000), 1e-5),
    "Gamma of a given concentration": (lambda z: D.Gamma(3.0, z[..., 0].exp()), 1, numbers(400_000), 1e-5),
    "Chi2": (lambda z: D.Chi2(z[..., 0].exp() + 4), 1, numbers(400_000), 1e-5),
    "Beta": (lambda z: D.Beta(z[..., 0].exp() + 1, z[..., 1].exp() + 1), 2, between_0_and_1, 1e-5),
    "Dirichlet": (lambda z: D.Dirichlet(z.exp() + 1), 2, shares, 1e-5),
    "MultivariateNormal of a given covariance": (
        lambda z: D.MultivariateNormal(z, scale_tril=lower(data(3, seed=9))),
        2,
        gauss_hermite,
        1e-8,
    ),
}


def information(make: Make, z: Tensor, nodes: Callable[[distributions.Distribution], tuple[Tensor, Tensor]]) -> Tensor:
    """E[s sᵀ] for the distribution made from one vector."""
    values, weights = nodes(make(z))
    scores = oracles.jacobian_by_column(lambda z: make(z).log_prob(values), z)
    return torch.einsum("n,ni,nj->ij", weights, scores, scores)


@functools.cache
def known_information(case: str, *at: float) -> Tensor:
    make, _, nodes, _ = CASES[case]
    return information(make, torch.tensor(at, dtype=torch.float64), nodes)


def expected_matrix(case: str, at: Tensor, c: Tensor) -> Tensor:
    rows = at.reshape(-1, CASES[case][1]).tolist()
    return torch.block_diag(*(weight * known_information(case, *z) for z, weight in zip(rows, c, strict=True)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_negative_log_probabilities_have_the_fisher_information_of_the_parameters(case: str, weighted: bool) -> None:
    make, width, _, rtol = CASES[case]
    at, c = data(4, width), torch.linspace(0.5, 2, 4).double() if weighted else torch.ones(4).double()
    y = make(at).sample()

    def loss(z: Tensor) -> Tensor:
        return -(c * make(z).log_prob(y)).mean()

    assert_matrix(loss, at, expected_matrix(case, at, c / 4), rtol=rtol)
    names = {weighted.term.function for weighted in recorded(loss, at)[2]}
    assert len(names) == 1
    assert next(iter(names)).endswith(".log_prob")


@pytest.mark.parametrize("case", CASES)
def test_sampled_seeds_have_the_second_moment_of_the_exact_ones(case: str) -> None:
    make, width, _, _ = CASES[case]
    at = data(2, width)
    y = make(at).sample()

    def loss(z: Tensor) -> Tensor:
        return -make(z).log_prob(y).mean()

    exact = exact_matrix(loss, at)
    error = float((sampled_matrix(loss, at, 1000) - exact).norm() / exact.norm())
    assert error < 0.2, error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_model_trains_with_it_without_a_word(case: str, fisher: str) -> None:
    make, width, _, _ = CASES[case]
    model, x = nn.Linear(3, width).double(), data(8, 3)
    y = make(data(8, width, seed=7)).sample()
    kfc = engine(model, fisher=fisher, kl_clip=0.01, damping=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = [float(train_step(kfc, optimizer, lambda: -make(model(x)).log_prob(y).mean())) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not any(kfc.events.state_dict().values())
    assert kfc.batches.sources.endswith(".log_prob")


def test_independent_dimensions_and_unbatched_ones_are_terms_of_their_own() -> None:
    at, y = data(3, 4), data(3, 2, seed=5)

    def joint(z: Tensor) -> Tensor:
        return -D.Independent(D.Normal(z[..., :2], z[..., 2:].exp()), 1).log_prob(y).mean()

    def apart(z: Tensor) -> Tensor:
        return -D.Normal(z[..., :2], z[..., 2:].exp()).log_prob(y).sum(1).mean()

    assert_matrix(joint, at, exact_matrix(apart, at))
    one = data(3)
    assert_matrix(
        lambda z: -D.Categorical(logits=z).log_prob(torch.tensor(1)), one, oracles.categorical_information(one)
    )


def test_samples_that_outnumber_the_parameters_add_up() -> None:
    at, y = data(3, 2), data(5, 3, seed=5)

    def loss(z: Tensor) -> Tensor:
        return -D.Normal(z[..., 0], z[..., 1].exp()).log_prob(y).sum()

    assert_matrix(loss, at, expected_matrix("Normal", at, 5 * torch.ones(3).double()), rtol=1e-6)


def test_a_prediction_that_is_given_as_the_value_is_one_all_the_same() -> None:
    at, y = data(4, 2), data(4, 2, seed=5)
    scale = torch.tensor(0.7).double()
    expected = torch.eye(8).double() / scale.square() / 8
    assert_matrix(lambda z: -D.Normal(y, scale).log_prob(z).mean(), at, expected)
    apart = torch.block_diag(*([torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double() / scale.square() / 4] * 4))
    assert_matrix(lambda z: -D.Normal(z[:, 0], scale).log_prob(z[:, 1]).mean(), at, apart)


# Policy gradients.


ADVANTAGES = torch.tensor([1.5, -0.5, 0.0, -2.0]).double()


@pytest.mark.parametrize("form", ["log_prob", "cross_entropy"])
def test_a_policy_gradient_has_the_fisher_matrix_of_the_policy(form: str) -> None:
    at, actions = data(4, 3), classes(4, count=3)

    def loss(z: Tensor) -> Tensor:
        if form == "log_prob":
            return -(D.Categorical(logits=z).log_prob(actions) * ADVANTAGES).mean()
        return (F.cross_entropy(z, actions, reduction="none") * ADVANTAGES).mean()

    used = (ADVANTAGES != 0).double()
    weights = used * ADVANTAGES.abs().sum() / used.sum() / 4
    policy = [c * oracles.categorical_information(z) for z, c in zip(at, weights, strict=True)]
    assert_matrix(loss, at, torch.block_diag(*policy))
    eigenvalues = torch.linalg.eigvalsh(exact_matrix(loss, at))
    assert float(eigenvalues.min()) > -1e-12


def test_a_clipped_ratio_counts_where_it_is_not_clipped() -> None:
    at, actions = data(4, 3), classes(4, count=3)
    old = D.Categorical(logits=at + 0.5 * data(4, 3, seed=8)).log_prob(actions)

    def loss(z: Tensor) -> Tensor:
        ratio = (D.Categorical(logits=z).log_prob(actions) - old).exp()
        return -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES).mean()

    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    reached = gradient.abs().sum(1) > 0
    blocks = exact_matrix(loss, at).reshape(4, 3, 4, 3).diagonal(dim1=0, dim2=2).abs().sum((0, 1)) > 0
    assert torch.equal(blocks, reached)


def test_policy_and_value_heads_both_have_curvature() -> None:
    torch.manual_seed(0)
    body, policy, value = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)
    model, x = nn.ModuleList([body, policy, value]).double(), data(16, 6)
    actions, returns = classes(16, count=3), data(16, seed=3)

    def loss(exploring: float) -> Tensor:
        h = body(x).tanh()
        d, v = D.Categorical(logits=policy(h)), value(h)[:, 0]
        advantage = (returns - v).detach()
        actor_critic = -(d.log_prob(actions) * advantage).mean() + 0.5 * F.mse_loss(v, returns)
        return actor_critic - exploring * d.entropy().mean() if exploring else actor_critic

    kfc = observe(model, lambda: loss(0.0))
    assert kfc.batches.sources == "Categorical.log_prob, mse_loss"
    assert all(layer.averages for layer in kfc.layers.values())
    assert observe(model, lambda: loss(0.01)).batches.sources.endswith("mse_loss, the gradient of the rest")


# What watching leaves behind.


def test_the_methods_are_as_before_once_nothing_is_recorded() -> None:
    before = {kind: kind.__dict__["log_prob"] for kind in DISTRIBUTIONS}

    def fails() -> None:
        with LossRecorder(), LossRecorder():
            assert D.Normal.log_prob is not before[D.Normal]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(kind.__dict__["log_prob"] is method for kind, method in before.items())


def test_two_recorders_see_the_same_calls_and_none_twice() -> None:
    z = data(4, 3).requires_grad_()
    with LossRecorder() as outer, LossRecorder() as inner:
        D.Bernoulli(logits=z * 1).log_prob(torch.ones(4, 3).double())
        D.Bernoulli(logits=z.detach()).log_prob(torch.ones(4, 3).double())
    assert [term.function for term in inner.terms] == ["Bernoulli.log_prob"]
    assert [term.function for term in outer.terms] == ["Bernoulli.log_prob"]


def test_densities_have_no_bound() -> None:
    y = data(4, 2, seed=5)
    _, value, terms = recorded(lambda z: -D.Normal(z, 0.1).log_prob(y).mean(), data(4, 2))
    assert not never_negative(value, terms, 1.0)


def test_what_has_degrees_of_freedom_to_learn_is_not_recognised() -> None:
    _, _, terms = recorded(lambda z: -D.StudentT(z.exp(), 0.0, 1.0).log_prob(torch.ones(())).mean(), data(4))
    assert terms == []


def test_shares_of_many_kinds_have_the_information_of_their_concentrations() -> None:
    at, y = data(2, 5).exp() + 0.3, D.Dirichlet(torch.ones(2, 5).double()).sample()
    trigamma = torch.polygamma(1, at)
    joint = torch.polygamma(1, at.sum(1))
    blocks = [torch.diag(own) - s for own, s in zip(trigamma, joint, strict=True)]
    assert_matrix(lambda z: -D.Dirichlet(z).log_prob(y).sum(), at, torch.block_diag(*blocks))


def test_a_sample_with_a_gradient_is_not_the_data_of_gamma_beta_or_dirichlet() -> None:
    for make in (lambda z: D.Gamma(z, z), lambda z: D.Beta(z, z), lambda z: D.Dirichlet(z)):
        _, _, terms = recorded(lambda z, make=make: make(z).log_prob(make(z).rsample()).mean(), data(4).exp())
        assert terms == []


@pytest.mark.parametrize(
    "make",
    [
        lambda z: D.NegativeBinomial(3.0, logits=z),
        lambda z: D.VonMises(z, 2.0),
    ],
)
def test_a_distribution_that_is_not_recognised_trains_by_the_losss_own_gradient(make: Make) -> None:
    model, x = nn.Linear(3, 2).double(), data(8, 3)
    y = make(data(8, 2, seed=7)).sample()
    kfc = engine(model, kl_clip=0.01, damping=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = [float(train_step(kfc, optimizer, lambda: -make(model(x)).log_prob(y).mean())) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert kfc.batches.sources == "the gradient of the loss itself"
