"""Readers of negative log-densities of numbers and counts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.losses.likelihoods import Gaussian, Poisson, PoissonRate
from lightning_kfc.losses.readers.residuals import sides_of
from lightning_kfc.losses.terms import LossTerm, broadcast, elementwise_term, values_of


def gaussian_nll_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> list[LossTerm]:
    """Read a call of ``F.gaussian_nll_loss``: a term for the mean, one for a variance with a gradient."""
    name, terms = "gaussian_nll_loss", []
    variance = values_of(var) if isinstance(var, Tensor) else values_of(input.new_tensor(var))
    variance = variance.clamp_min(eps)
    if variance.ndim and variance.shape == input.shape[:-1] and variance.shape != input.shape:
        variance = variance.unsqueeze(-1)
    result = broadcast(input.shape, target.shape, variance.shape)
    one = torch.ones_like(variance)
    sides = sides_of(input, target)
    if sides:
        prediction = values_of(sides[0][0])
        edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
        information = 1 / variance
        terms.append(
            elementwise_term(
                Gaussian(), name, value, prediction, edges, one, result, reduction,
                curvature=information / 2, bounded=False,
            )
        )  # fmt: skip
    if isinstance(var, Tensor) and var.requires_grad:
        # torch clamps without a derivative. Mean and variance have no joint Fisher information.
        edges, shape = ((get_gradient_edge(var), 1.0),), var.shape
        information = 1 / (2 * variance.square())
        term = elementwise_term(
            Gaussian(), name, value, variance, edges, one, result, reduction, curvature=information / 2, bounded=False
        )
        terms.append(replace(term, layout=lambda seed: seed.reshape(shape)))
    return terms


def poisson_nll_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> LossTerm | None:
    """Read a call of ``F.poisson_nll_loss``."""
    if not input.requires_grad:
        return None
    outputs = values_of(input)
    likelihood = Poisson() if log_input else PoissonRate()
    logits = outputs if log_input else outputs.clamp_min(0) + eps
    result = broadcast(input.shape, target.shape)
    edges = ((get_gradient_edge(input), 1.0),)
    own = logits.new_ones(())
    return elementwise_term(likelihood, "poisson_nll_loss", value, logits, edges, own, result, reduction, bounded=False)
