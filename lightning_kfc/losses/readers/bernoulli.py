"""Readers of losses of independent yes/no outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.losses.likelihoods import Bernoulli, BernoulliProbability
from lightning_kfc.losses.terms import LossTerm, broadcast, elementwise_term, values_of


def binary_cross_entropy_with_logits(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossTerm | None:
    """Read a call of ``F.binary_cross_entropy_with_logits``."""
    if not input.requires_grad:
        return None
    logits = values_of(input)
    own = torch.ones_like(logits) if weight is None else weight.detach().to(logits.dtype).expand(logits.shape)
    if pos_weight is not None:
        own = own * (1 + (pos_weight.detach().to(logits.dtype) - 1) * target.detach().to(logits.dtype))
    edges = ((get_gradient_edge(input), 1.0),)
    name = "binary_cross_entropy_with_logits"
    return elementwise_term(Bernoulli(), name, value, logits, edges, own, input.shape, reduction)


def binary_cross_entropy(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    """Read a call of ``F.binary_cross_entropy``: the outputs are probabilities."""
    if not input.requires_grad:
        return None
    own = torch.ones(()) if weight is None else weight.detach()
    edges = ((get_gradient_edge(input), 1.0),)
    probabilities, name = values_of(input), "binary_cross_entropy"
    own = own.to(probabilities)
    return elementwise_term(BernoulliProbability(), name, value, probabilities, edges, own, input.shape, reduction)


def soft_margin_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
) -> LossTerm | None:
    """Read a call of ``F.soft_margin_loss``: a cross entropy of the logits times the targets."""
    # log(1 + exp(-y z)) is the cross entropy of the logit y z; its Fisher information is even in y.
    result = broadcast(input.shape, target.shape)
    if not input.requires_grad or result != input.shape:
        return None
    size = target.detach().to(factor_dtype(input.dtype)).abs()
    logits = values_of(input) * size
    edges = ((get_gradient_edge(input), 1.0),)
    own = torch.ones_like(logits)
    return elementwise_term(
        Bernoulli(), "soft_margin_loss", value, logits, edges, own, result, reduction, curvature=size.square()
    )


def multilabel_soft_margin_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    """Read a call of ``F.multilabel_soft_margin_loss``: means of cross entropies over classes."""
    if not input.requires_grad or broadcast(input.shape, target.shape) != input.shape:
        return None
    logits = values_of(input)
    own = torch.ones_like(logits) if weight is None else weight.detach().to(logits).expand(logits.shape)
    # A mean over the classes, then the reduction over the other axes.
    own = own / max(logits.shape[-1], 1)
    if reduction == "mean":
        own = own / max(logits.shape[:-1].numel(), 1)
    edges = ((get_gradient_edge(input), 1.0),)
    name = "multilabel_soft_margin_loss"
    term = elementwise_term(Bernoulli(), name, value, logits, edges, own, logits.shape, "sum")
    if reduction != "none":
        return term
    return replace(term, weigh=lambda derivative: term.weigh(derivative.unsqueeze(-1)))
