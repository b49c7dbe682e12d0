r"""Readers of ``log_prob`` of torch's distributions.

The curvature of a term is the Fisher information of the distribution's parameters, for any value of the data. Location
and scale without joint information are separate terms. Parameters with joint information are one term: the seeds of
the parameters are products of independent seeds with a root of the information.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributions
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.losses import likelihoods
from lightning_kfc.losses.likelihoods import Gaussian, Likelihood, PoissonRate
from lightning_kfc.losses.readers.residuals import sides_of
from lightning_kfc.losses.terms import LossTerm, elementwise_term, values_of
from lightning_kfc.utilities.torch_internals import concentrations_of, scale_tril_of

Edges = tuple[tuple[Any, float], ...]


def categorical(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    """Read the log-probabilities of classes, of logits or of probabilities."""
    logits = distribution.logits
    if not logits.requires_grad:
        return []
    shape = logits.shape

    def weigh(derivative: Tensor) -> Tensor:
        weights = derivative.sum_to_size(shape[:-1])
        return weights.reshape(1) if len(shape) == 1 else weights

    def layout(seed: Tensor) -> Tensor:
        # The back-propagation through the normalisation leaves a seed that sums to 0 unchanged.
        return seed.reshape(shape)

    values, edges = values_of(logits), ((get_gradient_edge(logits), 1.0),)
    outputs = values.unsqueeze(0) if len(shape) == 1 else values
    name, edge = "Categorical.log_prob", get_gradient_edge(result)
    return [LossTerm(likelihoods.Categorical(), name, outputs, edges, layout, None, edge, weigh)]


def bernoulli(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    """Read the log-probabilities of yes/no outcomes."""
    return _of("Bernoulli", result, distribution.logits, likelihood=likelihoods.Bernoulli())


def binomial(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    """Read the log-probabilities of numbers of successes, with one yes/no outcome per trial."""
    trials = distribution.total_count.detach()
    return _of("Binomial", result, distribution.logits, trials, likelihood=likelihoods.Bernoulli())


def poisson(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    """Read the log-probabilities of counts."""
    return _of("Poisson", result, distribution.rate, likelihood=PoissonRate())


def exponential(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    r"""Read the log-densities of waiting times: :math:`1/r^2` for a rate r."""
    rate = distribution.rate
    return _of("Exponential", result, rate, 1 / values_of(rate).square())


def location_scale(name: str, of_location: float, of_scale: float) -> Callable[[Tensor, Any, Tensor], list[LossTerm]]:
    r"""Make the reader of a symmetric density with location and scale s.

    Args:
        name: The distribution's name.
        of_location: The information of the location, in multiples of :math:`1/s^2`.
        of_scale: The information of the scale, likewise.
    """

    def read(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
        return _location_scale(name, of_location, of_scale, result, distribution, value)

    return read


def student_t(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    r"""Read log-densities of Student's t with fixed degrees of freedom :math:`\nu`."""
    df = distribution.df
    if df.requires_grad:
        return []
    df = values_of(df)
    return _location_scale("StudentT", (df + 1) / (df + 3), 2 * df / (df + 3), result, distribution, value)


def _location_scale(
    name: str, of_location: float | Tensor, of_scale: float | Tensor, result: Tensor, distribution: Any, value: Tensor
) -> list[LossTerm]:
    location, scale = torch.as_tensor(distribution.loc), torch.as_tensor(distribution.scale)
    sides = sides_of(value, location)
    if not sides and (value.requires_grad or location.requires_grad):
        return []
    inverse, terms = 1 / values_of(scale).square(), []
    if sides:
        edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
        terms += _of(name, result, sides[0][0], of_location * inverse, edges=edges)
    return terms + _of(name, result, scale, of_scale * inverse)


def multivariate_normal(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    r"""Read log-densities of vectors with a full covariance :math:`LL^\top`.

    Seeds are made for the whitened mean :math:`L^{-1}\mu`, whose information is 1, and for :math:`L^{-1}\,dL`, whose
    elements have the information 2 on the diagonal and 1 below.
    """
    name, factor = "MultivariateNormal", scale_tril_of(distribution)
    sides = sides_of(value, distribution.loc)
    if not sides and (value.requires_grad or distribution.loc.requires_grad):
        return []
    L, terms = values_of(factor), []
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)

    def colored(seed: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(L.mT, seed, upper=True)
        return found

    if sides:
        edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
        information = identity.diagonal()
        terms.append(
            _whitened(name, result, sides[0][0], edges, information, lambda v: colored(v.unsqueeze(-1)).squeeze(-1))
        )
    if factor.requires_grad:
        edges, information = ((get_gradient_edge(factor), 1.0),), torch.ones_like(identity).tril() + identity
        terms.append(_whitened(name, result, factor, edges, information, lambda seed: colored(seed).tril()))
    return terms


def gamma(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    r"""Read log-densities of Gamma distributions with concentration :math:`\alpha` and rate :math:`\beta`.

    The concentration and the mean :math:`\alpha/\beta` have no joint information; theirs are
    :math:`\psi'(\alpha) - 1/\alpha` and :math:`\beta^2/\alpha`. Their seeds give those of concentration and rate.
    """
    concentration, rate = distribution.concentration, distribution.rate
    if value.requires_grad or not (concentration.requires_grad or rate.requires_grad):
        return []
    shape, alpha, beta = concentration.shape, values_of(concentration), values_of(rate)
    own = (torch.polygamma(1, alpha) - 1 / alpha).clamp_min(0).sqrt()
    layouts = {
        concentration: lambda seed: _pair(seed, shape)[0] * own + _pair(seed, shape)[1] / alpha.sqrt(),
        rate: lambda seed: -_pair(seed, shape)[1] * alpha.sqrt() / beta,
    }
    learnt = {parameter: layout for parameter, layout in layouts.items() if parameter.requires_grad}
    edges = tuple((get_gradient_edge(parameter), 1.0) for parameter in learnt)
    stacked, information = torch.stack([alpha, beta], -1), alpha.new_ones(2)
    term = _whitened("Gamma", result, stacked, edges, information, lambda seed: seed)
    return [replace(term, layouts=tuple(learnt.values()), layout_of_weights=lambda weights: _pair(weights, shape)[0])]


def _pair(seed: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    first, second = seed.reshape(*shape, 2).unbind(-1)
    return first, second


def dirichlet(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    """Read log-densities of shares."""
    return _of_shares("Dirichlet", result, distribution.concentration, value)


def beta(result: Tensor, distribution: Any, value: Tensor) -> list[LossTerm]:
    """Read log-densities of one share; torch stacks its two concentrations."""
    return _of_shares("Beta", result, concentrations_of(distribution), value)


def _of_shares(name: str, result: Tensor, concentration: Tensor, value: Tensor) -> list[LossTerm]:
    r"""The term of concentrations :math:`\alpha` with information :math:`D - s\,11^\top`.

    Here :math:`D = \mathrm{diag}(\psi'(\alpha))` and :math:`s = \psi'(\sum\alpha)`. A root of the information is
    :math:`D^{1/2}(I - \gamma uu^\top)` with :math:`u = D^{-1/2}1` and
    :math:`\gamma = (1 - \sqrt{1 - s\lVert u\rVert^2}) / \lVert u\rVert^2`.
    """
    if value.requires_grad or not concentration.requires_grad:
        return []
    alpha = values_of(concentration)
    own, joint = torch.polygamma(1, alpha), torch.polygamma(1, alpha.sum(-1, keepdim=True))
    u = own.rsqrt()
    length = u.square().sum(-1, keepdim=True)
    share = (1 - (1 - joint * length).clamp_min(0).sqrt()) / length

    def layout(seed: Tensor) -> Tensor:
        return own.sqrt() * (seed - share * u * (u * seed).sum(-1, keepdim=True))

    edges, information = ((get_gradient_edge(concentration), 1.0),), alpha.new_ones(alpha.shape[-1])
    return [_whitened(name, result, concentration, edges, information, layout)]


def _of(
    name: str,
    result: Tensor,
    parameter: Tensor,
    information: Tensor | None = None,
    *,
    likelihood: Likelihood | None = None,
    edges: Edges | None = None,
) -> list[LossTerm]:
    """The term of a parameter with independent elements; none if it has no gradient.

    Args:
        name: The distribution's name.
        result: The log-probabilities.
        parameter: The parameter.
        information: Its Fisher information, in multiples of the likelihood's.
        likelihood: The likelihood; None for a likelihood of information 1.
        edges: The edges of the seeds; None for the parameter itself.
    """
    if not parameter.requires_grad:
        return []
    if likelihood is None:
        assert information is not None
        likelihood, information = Gaussian(), information / 2
    edges = ((get_gradient_edge(parameter), 1.0),) if edges is None else edges
    values = values_of(parameter)
    one, function = values.new_ones(()), f"{name}.log_prob"
    return [
        elementwise_term(
            likelihood, function, result, values, edges, one, result.shape, "none", curvature=information, bounded=False
        )
    ]


def _whitened(
    name: str, result: Tensor, parameter: Tensor, edges: Edges, information: Tensor, layout: Callable[[Tensor], Tensor]
) -> LossTerm:
    """The term of a parameter that is a vector or a matrix for each log-density.

    Args:
        name: The distribution's name.
        result: The log-densities.
        parameter: The parameter.
        edges: Where seeds enter the graph.
        information: The information of the whitened elements of one vector or matrix.
        layout: Turns a seed of whitened elements into one of the parameter.
    """
    shape, values, own = parameter.shape, values_of(parameter), information.flatten()
    batch = shape[: parameter.ndim - information.ndim]
    examples = batch or (1,)

    def weigh(derivative: Tensor) -> Tensor:
        return derivative.sum_to_size(batch).reshape(*examples, 1) * own / 2

    def weigh_in_loss(derivative: Tensor) -> Tensor:
        return derivative.sum_to_size(batch).reshape(*examples, 1).expand(*examples, len(own))

    return LossTerm(
        Gaussian(),
        f"{name}.log_prob",
        values.reshape(*examples, len(own)),
        edges,
        lambda seed: layout(seed.reshape(shape)),
        None,
        get_gradient_edge(result),
        weigh,
        weigh_in_loss,
        lambda weights: weights.reshape(shape),
    )


#: The distributions whose ``log_prob`` is recognised; also in compositions of these.
DISTRIBUTIONS: dict[type, Callable[[Tensor, Any, Tensor], list[LossTerm]]] = {
    distributions.Categorical: categorical,
    distributions.Bernoulli: bernoulli,
    distributions.Binomial: binomial,
    distributions.Poisson: poisson,
    distributions.Exponential: exponential,
    distributions.Normal: location_scale("Normal", 1.0, 2.0),
    distributions.Laplace: location_scale("Laplace", 1.0, 1.0),
    distributions.Cauchy: location_scale("Cauchy", 0.5, 0.5),
    distributions.StudentT: student_t,
    distributions.MultivariateNormal: multivariate_normal,
    distributions.Gamma: gamma,
    distributions.Dirichlet: dirichlet,
    distributions.Beta: beta,
}
