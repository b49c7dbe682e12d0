"""Loss terms: weighted negative log-likelihoods that a loss consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.losses.likelihoods import Likelihood


@dataclass(frozen=True)
class LossTerm:
    """One call of a loss function: many terms of one likelihood, weighted by the call's own options.

    Attributes:
        likelihood: The likelihood of the terms.
        function: The loss function's name, for messages.
        logits: The logits' values, shape ``(examples, *positions, outputs)``.
        edges: Where seeds enter the graph, each with a sign.
        layout: Turns a seed shaped as ``logits`` into the shape of the tensor at the edges.
        value: The loss function's result; None if it has none, or may be negative.
        value_edge: The result's gradient edge; None if the weights are known.
        weigh: Returns the weights of the terms from the derivative of the loss with respect to the result.
        weigh_in_loss: Like ``weigh``, but without the curvature of the terms; None if ``weigh`` has no such factor.
        layout_of_weights: Turns weights shaped as ``logits`` into the shape of the tensor at the edges; None for
            ``layout``.
        layouts: One layout for each edge, in the place of ``layout``; empty if one serves all edges.
    """

    likelihood: Likelihood
    function: str
    logits: Tensor
    edges: tuple[tuple[GradientEdge, float], ...]
    layout: Callable[[Tensor], Tensor]
    value: Tensor | None
    value_edge: GradientEdge | None
    weigh: Callable[[Tensor], Tensor]
    weigh_in_loss: Callable[[Tensor], Tensor] | None = None
    layout_of_weights: Callable[[Tensor], Tensor] | None = None
    layouts: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def saturates(self) -> bool:
        """Whether the curvature falls to 0 with the loss, as that of labels.

        Logits of each example against all examples of the batch are those of a contrastive loss, which has no labels:
        which similarities are large depends on the other examples.
        """
        shape = self.logits.shape
        contrastive = self.likelihood.vector_valued and len(shape) == 2 and shape[0] == shape[1]
        return self.likelihood.saturates and not contrastive

    def term_weights(self, derivative: Tensor) -> Tensor:
        """The weights c, shape ``(examples, *positions)`` (categorical) or as ``logits``.

        The weights are absolute values, since a Fisher matrix has no negative part: a subtracted term counts as
        much as an added one.

        Terms of both signs in one call, as in a policy gradient (log-probability times advantage), are no likelihood
        of the data. Then all terms of nonzero weight get the mean absolute weight: the curvature is the Fisher matrix
        of the policy over the visited states, as in the natural policy gradient (Kakade 2001), in the units of the
        loss.
        """
        return self.weigh(_of_one_sign(derivative.detach().to(self.logits))).abs()

    def weights_in_loss(self, derivative: Tensor) -> Tensor:
        """The factors of the terms in the loss: the weights without the terms' own curvature."""
        weigh = self.weigh if self.weigh_in_loss is None else self.weigh_in_loss
        return weigh(derivative.detach().to(self.logits)).abs()


def _of_one_sign(derivative: Tensor) -> Tensor:
    """Nonzero derivatives of both signs replaced by their mean absolute value; others unchanged."""
    if not (bool((derivative > 0).any()) and bool((derivative < 0).any())):
        return derivative
    used = derivative != 0
    return used * (derivative.abs().sum() / used.sum())


def elementwise_term(
    likelihood: Likelihood,
    function: str,
    value: Tensor,
    logits: Tensor,
    edges: tuple[tuple[GradientEdge, float], ...],
    weight: Tensor,
    result_shape: torch.Size,
    reduction: str,
    *,
    curvature: Tensor | None = None,
    bounded: bool = True,
) -> LossTerm:
    """A term with independent outputs; ``weight`` and ``curvature`` broadcast to the unreduced result.

    Args:
        likelihood: The likelihood of the terms.
        function: The loss function's name.
        value: Its result.
        logits: The logits' values, as they broadcast to the result.
        edges: Where seeds enter the graph.
        weight: The call's own weights.
        result_shape: The shape of the result with the reduction ``"none"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        curvature: The curvature of each term, as a multiple of the likelihood's; None for 1.
        bounded: Whether the loss function is never negative.
    """
    shape = logits.shape
    weight = weight.to(logits.dtype).expand(result_shape)
    if reduction == "mean":
        weight = weight / max(result_shape.numel(), 1)
    curved = weight if curvature is None else weight * curvature

    def weigh_by(weight: Tensor) -> Callable[[Tensor], Tensor]:
        # The result may be broadcast from the input: the terms on one output add up.
        return lambda derivative: with_outputs((weight * derivative).sum_to_size(shape))

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape)

    outputs, found = with_outputs(logits), value.detach().clone() if bounded else None
    edge, in_loss = get_gradient_edge(value), None if curvature is None else weigh_by(weight)
    return LossTerm(likelihood, function, outputs, edges, layout, found, edge, weigh_by(curved), in_loss)


def with_outputs(tensor: Tensor) -> Tensor:
    """A tensor with an examples axis and an outputs axis; a vector or a number becomes a column."""
    return tensor.reshape(-1, 1) if tensor.ndim < 2 else tensor


def values_of(tensor: Tensor) -> Tensor:
    """Copy a tensor's values, in the precision of the factors."""
    # A copy, since the model may change its logits in place after the loss.
    return tensor.detach().to(factor_dtype(tensor.dtype), copy=True)


def broadcast(*shapes: torch.Size) -> torch.Size:
    """Return the shape that shapes broadcast to."""
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]  # torch's own
