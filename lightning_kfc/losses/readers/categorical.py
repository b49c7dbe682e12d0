"""Readers of cross entropies over classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.losses.likelihoods import Categorical
from lightning_kfc.losses.terms import LossTerm, broadcast, values_of


def cross_entropy(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossTerm | None:
    """Read a call of ``F.cross_entropy``."""
    if not input.requires_grad:
        return None
    logits = values_of(_classes_last(input))
    weights = _categorical_weights(logits, target, weight, ignore_index, reduction, label_smoothing)

    def weigh(derivative: Tensor) -> Tensor:
        return weights * (derivative.reshape(weights.shape) if reduction == "none" else derivative)

    edges = ((get_gradient_edge(input), 1.0),)
    layout = _classes_second(input.shape)
    # A copy, since the loss may change the result in place.
    result = value.detach().clone()
    return LossTerm(Categorical(), "cross_entropy", logits, edges, layout, result, get_gradient_edge(value), weigh)


def nll_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> LossTerm | None:
    """Read a call of ``F.nll_loss``: log-probabilities are logits of themselves."""
    # The back-propagation through log_softmax leaves a seed that sums to 0 unchanged.
    term = cross_entropy(value, input, target, weight, ignore_index, reduction)
    return None if term is None else replace(term, function="nll_loss")


def kl_div(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    log_target: bool = False,
) -> LossTerm | None:
    """Read a call of ``F.kl_div``: a cross entropy minus the entropy of the target."""
    if not input.requires_grad:
        return None
    class_dim = _axis_of_probabilities(input)
    if class_dim is None:
        return None
    logits = values_of(input)
    masses = target.detach().to(logits.dtype)
    masses = masses.exp() if log_target else masses
    result, shape = broadcast(input.shape, target.shape), input.shape
    masses = masses.expand(result)
    if reduction == "mean":
        masses = masses / max(result.numel(), 1)
    elif reduction == "batchmean":
        masses = masses / max(len(input), 1)

    def weigh(derivative: Tensor) -> Tensor:
        # The weight of the cross entropy is the sum of the target's probabilities.
        weights = (masses * derivative).sum_to_size(shape).sum(class_dim)
        return weights.unsqueeze(0) if len(shape) == 1 else weights

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape) if len(shape) == 1 else seed.movedim(-1, class_dim)

    logits = logits.unsqueeze(0) if len(shape) == 1 else logits.movedim(class_dim, -1)
    edges = ((get_gradient_edge(input), 1.0),)
    result_edge, found = get_gradient_edge(value), value.detach().clone()
    return LossTerm(Categorical(), "kl_div", logits, edges, layout, found, result_edge, weigh)


def _categorical_weights(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """The weight of each term of a cross entropy, from its class weights, ignored targets and reduction."""
    classes = logits.shape[-1]
    per_class = logits.new_ones(classes) if weight is None else weight.detach().to(logits.dtype)
    if target.is_floating_point():
        soft = _classes_last(target.detach()).to(logits.dtype)
        soft = soft * (1 - smoothing) + smoothing / classes
        weights = soft @ per_class
        return weights / max(weights.numel(), 1) if reduction == "mean" else weights
    target = target.detach().reshape(logits.shape[:-1])
    kept = target != ignore_index
    own = per_class[target.where(kept, 0)] * kept
    weights = (1 - smoothing) * own + smoothing / classes * per_class.sum() * kept
    if reduction == "mean":
        total = own.sum()
        weights = torch.where(total > 0, weights / total, torch.zeros_like(weights))
    return weights


def _classes_last(tensor: Tensor) -> Tensor:
    """Logits ``(N, C, *positions)`` or ``(C,)`` as ``(N, *positions, C)``."""
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor.movedim(1, -1)


def _classes_second(shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """The inverse of :func:`_classes_last` for logits of a given shape."""
    return lambda seed: seed.reshape(shape) if len(shape) == 1 else seed.movedim(-1, 1)


def _axis_of_probabilities(log_probabilities: Tensor) -> int | None:
    """The axis over which the probabilities sum to 1; None without one."""
    if not log_probabilities.numel():
        return None
    probabilities = values_of(log_probabilities).exp()
    tolerance = max(1e-3, 8 * torch.finfo(log_probabilities.dtype).eps)
    axes = range(log_probabilities.ndim)
    faults = [float((probabilities.sum(axis) - 1).abs().max()) for axis in axes]
    best = min(axes, key=lambda axis: (not faults[axis] <= tolerance, faults[axis]), default=None)
    return best if best is not None and faults[best] <= tolerance else None
