"""All private names of Lightning that the callback uses."""

from __future__ import annotations

import os
from typing import Any

#: Prefixes of the checkpoints that Lightning's finders write, restore and remove.
FINDERS_CHECKPOINTS = (".lr_find_", ".scale_batch_size_")


def accumulates(trainer: Any) -> bool:
    """Whether the present batch only accumulates its gradient, with no optimizer step after it."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_step(trainer: Any) -> int:
    """The step number that loggers use for the present optimizer step."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def data_parallel_group(strategy: Any) -> Any:
    """The ranks that split the batch; None for all ranks.

    They are fewer than all under strategies with a device mesh, such as ``ModelParallelStrategy``.
    """
    mesh = getattr(strategy, "_device_mesh", None)
    return mesh["data_parallel"].get_group() if mesh is not None else None


def resumed_from(trainer: Any) -> str | None:
    """The path of the checkpoint that the user resumes from, or None.

    The trainer may also hold the path of a finder's own checkpoint, which does not count.
    """
    path = trainer.ckpt_path
    if path is None or os.path.basename(str(path)).startswith(FINDERS_CHECKPOINTS):
        return None
    return str(path)
