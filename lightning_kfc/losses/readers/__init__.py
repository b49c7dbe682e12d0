"""Readers of torch's loss functions: each returns the loss term of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from lightning_kfc.losses.readers import bernoulli, categorical, densities, residuals
from lightning_kfc.losses.terms import LossTerm

#: The recognised loss functions.
LOSS_FUNCTIONS: dict[Any, Callable[..., LossTerm | list[LossTerm] | None]] = {
    F.cross_entropy: categorical.cross_entropy,
    F.nll_loss: categorical.nll_loss,
    F.kl_div: categorical.kl_div,
    F.binary_cross_entropy_with_logits: bernoulli.binary_cross_entropy_with_logits,
    F.binary_cross_entropy: bernoulli.binary_cross_entropy,
    F.soft_margin_loss: bernoulli.soft_margin_loss,
    F.multilabel_soft_margin_loss: bernoulli.multilabel_soft_margin_loss,
    F.mse_loss: residuals.mse_loss,
    F.l1_loss: residuals.l1_loss,
    F.smooth_l1_loss: residuals.smooth_l1_loss,
    F.huber_loss: residuals.huber_loss,
    F.gaussian_nll_loss: densities.gaussian_nll_loss,
    F.poisson_nll_loss: densities.poisson_nll_loss,
}
