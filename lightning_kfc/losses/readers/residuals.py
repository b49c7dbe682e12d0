"""Readers of losses of the difference between prediction and target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.losses.likelihoods import Gaussian
from lightning_kfc.losses.terms import LossTerm, elementwise_term, reduction_of, values_of


def mse_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    """Read a call of ``F.mse_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    return _difference("mse_loss", value, input, target, reduction, weight)


def l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    """Read a call of ``F.l1_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    return _difference("l1_loss", value, input, target, reduction, weight, curvature=_absolute)


def smooth_l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> LossTerm | None:
    """Read a call of ``F.smooth_l1_loss``."""
    reduction = reduction_of(size_average, reduce, reduction)
    curvature = _absolute if beta == 0 else lambda residuals: 1 / (2 * residuals.clamp_min(beta))
    return _difference("smooth_l1_loss", value, input, target, reduction, curvature=curvature)


def huber_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossTerm | None:
    """Read a call of ``F.huber_loss``."""
    return _difference(
        "huber_loss",
        value,
        input,
        target,
        reduction,
        weight,
        weighted_mean=False,
        curvature=lambda residuals: delta / (2 * residuals.clamp_min(delta)),
    )


def _difference(
    function: str,
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    *,
    weighted_mean: bool = True,
    curvature: Callable[[Tensor], Tensor] | None = None,
) -> LossTerm | None:
    r"""A term of a loss :math:`\rho(z - y)`.

    Where it is not a square, its curvature is that of iteratively reweighted least squares, :math:`\rho'(r)/r`:
    of the parabola that touches :math:`\rho` at the residuals r and -r, and lies nowhere below it. In a quadratic zone
    that is the second derivative; in a linear one, which has none, it is positive and falls with the residual.

    Args:
        function: The loss function's name.
        value: Its result.
        input: Its first argument.
        target: Its second. The loss is symmetric: a prediction given as the target, or on both sides, is one all the
            same.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: The weights of the terms.
        weighted_mean: Whether a mean is divided by the weights' sum instead of their number.
        curvature: Gives :math:`\rho'(r)/(2r)`, a multiple of the square's, from the absolute residuals.
    """
    sides = sides_of(input, target)
    if not sides or input.is_complex() or target.is_complex():
        return None
    logits = values_of(sides[0][0])
    residuals = input.detach().to(logits.dtype) - target.detach().to(logits.dtype)
    own = logits.new_ones(()) if weight is None else weight.detach().to(logits.dtype)
    if weight is not None and weighted_mean and reduction == "mean":
        own, reduction = own / own.sum(), "sum"
    edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
    curved = None if curvature is None else curvature(residuals.abs())
    return elementwise_term(
        Gaussian(), function, value, logits, edges, own, residuals.shape, reduction, curvature=curved
    )


def _absolute(residuals: Tensor) -> Tensor:
    """The curvature of absolute residuals r in multiples of a square's: 1/(2r), but no more than at their mean.

    The floor makes the sum of curvatures finite, and is in the units of the residuals whatever these are. Near it is
    the curvature of the expected loss, 2 p(0) for residuals of density p: 1 over the mean, where they are Laplace's.
    Where all are 0 there is no scale, and no gradient either: the curvature is 0.
    """
    bounds = torch.maximum(residuals, residuals.mean()) if residuals.numel() else residuals
    return torch.where(bounds > 0, 1 / (2 * bounds), torch.where(bounds == 0, 0.0, bounds))


def sides_of(input: Tensor, target: Tensor) -> list[tuple[Tensor, float]]:
    """The arguments of a symmetric loss that are predictions, with signs; none where two do not agree in shape."""
    sides = [(side, sign) for side, sign in ((input, 1.0), (target, -1.0)) if side.requires_grad]
    return [] if len(sides) == 2 and input.shape != target.shape else sides
