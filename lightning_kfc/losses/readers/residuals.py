"""Readers of losses of the difference between prediction and target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.losses.likelihoods import Gaussian
from lightning_kfc.losses.terms import LossTerm, elementwise_term, values_of


def mse_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    """Read a call of ``F.mse_loss``."""
    return _difference("mse_loss", value, input, target, reduction, weight)


def l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    """Read a call of ``F.l1_loss``."""
    return _difference("l1_loss", value, input, target, reduction, weight, curvature=_absolute)


def smooth_l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    beta: float = 1.0,
) -> LossTerm | None:
    """Read a call of ``F.smooth_l1_loss``."""
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

    The curvature of other losses than squares is :math:`\rho'(r)/r`, as in iteratively reweighted least squares. It
    belongs to the parabola that touches :math:`\rho` at the residuals r and -r from above. In a quadratic zone it is
    the second derivative; in a linear zone it is positive and decreases with the residual. The L1 loss has no quadratic
    zone and gets one.

    Args:
        function: The loss function's name.
        value: Its result.
        input: Its first argument.
        target: Its second argument; the prediction may be either argument, or both.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: The weights of the terms.
        weighted_mean: Whether a mean is divided by the sum of the weights instead of their number.
        curvature: Returns the curvature relative to the square's from the absolute residuals.
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
    """The curvature of absolute residuals r relative to a square's: 1/(2m) up to their mean m, and 0 beyond.

    It is the second derivative of Huber's loss with a quadratic zone of m, which has the units of the residuals. Its
    mean estimates the curvature of the expected loss, twice the density of residuals at 0. If all residuals are 0,
    there is no gradient, and the curvature is 0.
    """
    if not residuals.numel():
        return residuals
    # A mean of equal numbers may be rounded to below all of them.
    zone = torch.maximum(residuals.mean(), residuals.min())
    return torch.where((residuals <= zone) & (zone > 0), 1 / (2 * zone), 0.0 * zone)


def sides_of(input: Tensor, target: Tensor) -> list[tuple[Tensor, float]]:
    """The arguments of a symmetric loss with a gradient, with signs; none for two of different shapes."""
    sides = [(side, sign) for side, sign in ((input, 1.0), (target, -1.0)) if side.requires_grad]
    return [] if len(sides) == 2 and input.shape != target.shape else sides
