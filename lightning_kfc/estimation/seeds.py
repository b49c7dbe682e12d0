"""Weights of loss terms, and the seeds whose back-propagation gives their Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_kfc.estimation.graph import explained, loss_edge
from lightning_kfc.losses.terms import LossTerm

Seeds = list[tuple[GradientEdge, Tensor]]


@dataclass(frozen=True)
class WeightedTerm:
    """A recorded loss function that the loss contains, with the weights c of its terms."""

    term: LossTerm
    weights: Tensor
    derivative: Tensor

    def is_finite(self) -> bool:
        """Whether logits and weights are finite.

        A logit of minus infinity excludes a class, and is allowed while another class is left.
        """
        logits = self.term.logits
        if self.term.likelihood.vector_valued and logits.numel():
            logits = logits.amax(-1)
        return bool(torch.isfinite(logits).all() and torch.isfinite(self.weights).all())


def weighted_terms(
    loss: Tensor, terms: Sequence[LossTerm], *, loss_scale: float = 1.0, loss_fraction: float = 1.0
) -> list[WeightedTerm]:
    """The recorded loss terms that the loss contains, with their weights.

    A loss function that was called for a metric is recorded too, but the loss has no derivative with respect to it.

    Args:
        loss: The loss of this backward.
        terms: The recorded terms.
        loss_scale: The factor that a gradient scaler multiplied the loss by.
        loss_fraction: The share of this backward in the optimizer step (1/k when k micro-batches are
            accumulated), for terms without a derivative in the loss.
    """
    edges = [term.value_edge for term in terms if term.value_edge is not None]
    derivatives: Iterator[Tensor | None] = iter(())
    if edges:
        start = torch.full_like(loss, 1.0 / loss_scale)
        found = explained(torch.autograd.grad, [loss_edge(loss)], edges, [start], retain_graph=True, allow_unused=True)
        derivatives = iter(found)
    kept = []
    for term in terms:
        derivative = term.logits.new_tensor(loss_fraction) if term.value_edge is None else next(derivatives)
        if derivative is not None:
            kept.append(WeightedTerm(term, term.term_weights(derivative), derivative))
    return _outermost(kept)


def _outermost(terms: list[WeightedTerm]) -> list[WeightedTerm]:
    """Leave out terms inside other terms, as the cross entropies in a squared difference of them."""
    calls = {key: weighted for weighted in terms if (key := _value_key(weighted)) is not None}
    if len(calls) < 2:
        return terms
    edges = [GradientEdge(*key) for key in calls]
    ones = [torch.ones_like(weighted.derivative) for weighted in calls.values()]
    arrived = explained(torch.autograd.grad, edges, edges, ones, retain_graph=True)
    inner = {key for key, total in zip(calls, arrived, strict=True) if bool((total != 1).any())}
    return [weighted for weighted in terms if _value_key(weighted) not in inner]


def _value_key(weighted: WeightedTerm) -> tuple[Node, int] | None:
    edge = weighted.term.value_edge
    return None if edge is None else (edge.node, edge.output_nr)


#: Rounding error of a difference, also in half precision, as a share of the loss.
ROUNDING = 0.01


def never_negative(loss: Tensor, terms: Sequence[WeightedTerm], loss_scale: float) -> bool:
    """Whether a loss is bounded by 0: it has recognised terms, none is subtracted, and its rest is not negative.

    Args:
        loss: The loss.
        terms: All its recognised terms.
        loss_scale: The factor that a gradient scaler has multiplied the loss by.
    """
    total = loss.new_zeros((), dtype=torch.float64)
    for weighted in terms:
        value = weighted.term.value
        if value is None or bool((weighted.derivative < 0).any()) or bool((value < 0).any()):
            return False
        total += torch.sum(weighted.derivative.double() * value.double())
    whole = loss.detach().double() / loss_scale
    return bool(terms) and bool(whole - total >= -ROUNDING * whole.abs())


def signed_weights(terms: Sequence[WeightedTerm]) -> tuple[float, float]:
    """The sum of the positive weights of results in the loss, and that of the negative ones without their sign."""
    weights = [weighted.derivative.double() for weighted in terms]
    return sum(float(w.clamp(min=0).sum()) for w in weights), sum(float(-w.clamp(max=0).sum()) for w in weights)


def all_zero(terms: Sequence[WeightedTerm]) -> bool:
    """Whether there are terms with examples, and all have the weight 0."""
    weights = [weighted.weights for weighted in terms if weighted.weights.numel()]
    return bool(weights) and not any(bool(own.any()) for own in weights)


def seed_scale(terms: Sequence[WeightedTerm]) -> float:
    """A power of two that brings the largest seeds near 1, so that they do not underflow in half precision."""
    largest = max((float(w.weights.max()) for w in terms if w.weights.numel()), default=0.0)
    if not (largest > 0 and math.isfinite(largest)):
        return 1.0
    return float(2.0 ** -round(math.log2(largest) / 2))


def edges_with_seed(term: LossTerm, seed: Tensor) -> Seeds:
    """A seed in the logits' shape, laid out at the edges of a term."""
    if term.layouts:
        return [(edge, layout(seed)) for (edge, _), layout in zip(term.edges, term.layouts, strict=True)]
    laid_out = term.layout(seed)
    return [(edge, laid_out if sign > 0 else -laid_out) for edge, sign in term.edges]


def seed_passes(terms: Sequence[WeightedTerm], fisher: str, generator: torch.Generator) -> Iterator[Seeds]:
    """The seeds of each back-propagation; their G's are summed.

    Args:
        terms: The loss terms.
        fisher: ``"mc"`` (one pass), ``"exact"`` (one pass a position and outcome) or ``"empirical"`` (one pass).
        generator: The source of randomness.
    """
    if fisher == "exact":
        for weighted in terms:
            for seed in weighted.term.likelihood.exact_seeds(weighted.term.logits, weighted.weights, generator):
                yield edges_with_seed(weighted.term, seed)
        return
    together: Seeds = []
    for weighted in terms:
        if fisher == "empirical":
            together += _empirical_seed(weighted, generator)
        else:
            seed = weighted.term.likelihood.sampled_seed(weighted.term.logits, weighted.weights, generator)
            together += edges_with_seed(weighted.term, seed)
    yield together


def unusable_seeds(terms: Sequence[WeightedTerm], fisher: str, generator: torch.Generator) -> Iterator[Seeds]:
    """NaN seeds in the place of those of logits or weights that are not finite.

    The number of passes is that of :func:`seed_passes`, since layers may communicate with other ranks in each pass.
    """
    if fisher == "exact":
        for seeds in seed_passes(terms, fisher, generator):
            yield [(edge, torch.full_like(seed, math.nan)) for edge, seed in seeds]
        return
    yield [pair for w in terms for pair in edges_with_seed(w.term, torch.full_like(w.term.logits, math.nan))]


def _empirical_seed(weighted: WeightedTerm, generator: torch.Generator) -> Seeds:
    r"""Seeds :math:`\pm\sqrt{c}\,\nabla_z\ell(z, y)` with the data's y, from :math:`c\,\nabla_z\ell` of autograd.

    Random signs make the products of different terms cancel in expectation, as sampled targets do.
    """
    term = weighted.term
    if term.value_edge is None:
        raise ValueError(f"fisher='empirical' needs targets, and the {term.function} has none. Use likelihood='auto'.")
    edges = [edge for edge, _ in term.edges]
    gradients = torch.autograd.grad([term.value_edge], edges, [weighted.derivative], retain_graph=True)
    weights = term.weights_in_loss(weighted.derivative)
    signs = torch.randint(0, 2, weights.shape, generator=generator, device=weights.device) * 2 - 1
    factor = torch.where(weights > 0, signs / weights.sqrt(), torch.zeros_like(weights))
    if term.likelihood.vector_valued:
        factor = factor.unsqueeze(-1).expand(term.logits.shape)
    laid_out = (term.layout_of_weights or term.layout)(factor)
    return [(edge, gradient * laid_out) for edge, gradient in zip(edges, gradients, strict=True)]
