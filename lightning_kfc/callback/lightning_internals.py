"""Every private name of Lightning, and of torch's gradient scaler, that the callback relies on."""

from __future__ import annotations

import os
from typing import Any

from torch.optim import Optimizer

#: Beginnings of the checkpoints that Lightning's finders write, return to and remove.
FINDERS_CHECKPOINTS = (".lr_find_", ".scale_batch_size_")


def accumulates(trainer: Any) -> bool:
    """Whether the present batch only adds to the gradient, and no optimizer step follows it."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_step(trainer: Any) -> int:
    """The number by which loggers name the present optimizer step."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def data_parallel_group(strategy: Any) -> Any:
    """The ranks between which the batch is split; None where these are all.

    Only strategies with a device mesh, such as ``ModelParallelStrategy``, split a layer among the other ranks.
    """
    mesh = getattr(strategy, "_device_mesh", None)
    return mesh["data_parallel"].get_group() if mesh is not None else None


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer, such as a fused one, divides its gradients by the loss scale in its own step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def resumed_from(trainer: Any) -> str | None:
    """The user's checkpoint that a fit goes on from, or None.

    The learning-rate finder and the batch-size scaler leave the name of their own checkpoint behind.
    """
    path = trainer.ckpt_path
    if path is None or os.path.basename(str(path)).startswith(FINDERS_CHECKPOINTS):
        return None
    return str(path)
