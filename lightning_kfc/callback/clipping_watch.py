"""Measure how much a Trainer's gradient clipping shortens preconditioned updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.callback.schedule_preview import is_lightnings_own
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.monitoring.advice import CLIPPED_STEPS


class ClippingWatch:
    """Compares the length of each update before and after clipping, on the gradients' device."""

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        clips = bool(trainer.gradient_clip_val) or not is_lightnings_own(pl_module, "configure_gradient_clipping")
        # Manual optimization clips plain gradients, before they are preconditioned.
        self._active = clips and pl_module.automatic_optimization
        self._before: dict[int, Tensor] = {}
        self._ratios: deque[Tensor] = deque(maxlen=CLIPPED_STEPS)
        self._count = 0

    def preconditioned(self, optimizer: Optimizer) -> None:
        """Measure the length of an optimizer's update before clipping."""
        if self._active and (length := _length(optimizer)) is not None:
            self._before[id(optimizer)] = length

    def stepped(self, optimizers: Iterable[Optimizer]) -> bool:
        """Compare the optimizers' updates after clipping with those before.

        Returns:
            Whether a full window of steps has passed since the last one.
        """
        for optimizer in optimizers:
            before = self._before.pop(id(optimizer), None)
            after = _length(optimizer) if before is not None else None
            if before is not None and after is not None:
                self._ratios.append(after / before)
                self._count += 1
        full = self._count >= CLIPPED_STEPS
        self._count = 0 if full else self._count
        return full

    def factors(self) -> tuple[float, ...]:
        """Length after clipping over length before, for the last updates of nonzero length."""
        ratios = torch.stack(list(self._ratios)).tolist() if self._ratios else []
        return tuple(ratio for ratio in ratios if ratio == ratio)


def _length(optimizer: Optimizer) -> Tensor | None:
    """The norm of all gradients together, on their device; None if they are sharded or sparse."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients or any(map(is_sharded, gradients)) or any(g.is_sparse for g in gradients):
        return None
    return torch.nn.utils.get_total_norm(gradients)
