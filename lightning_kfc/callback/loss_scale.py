"""Factors of a gradient scaler on the loss and its gradients."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_kfc.utilities.torch_internals import unscales_in_step


def gradient_scaler(trainer: Any) -> Any:
    """The enabled gradient scaler; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: Any) -> float:
    """The scaler's factor on the loss; 1 without a scaler."""
    scaler = gradient_scaler(trainer)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def gradient_scale(trainer: Any, optimizer: Optimizer) -> float:
    """The scaler's factor on the gradients in ``on_before_optimizer_step``; 1 for most optimizers."""
    return loss_scale(trainer) if unscales_in_step(optimizer) else 1.0
