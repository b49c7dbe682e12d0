"""Factors by which a gradient scaler has multiplied the loss and its gradients."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_kfc.callback.lightning_internals import unscales_in_step


def gradient_scaler(trainer: Any) -> Any:
    """The gradient scaler at work; None where there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: Any) -> float:
    """The factor of the loss; 1 without a gradient scaler."""
    scaler = gradient_scaler(trainer)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def gradient_scale(trainer: Any, optimizer: Optimizer) -> float:
    """The factor of the gradients in ``on_before_optimizer_step``, where most optimizers have theirs unscaled."""
    return loss_scale(trainer) if unscales_in_step(optimizer) else 1.0
