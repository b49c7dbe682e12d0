"""A deterministic training that can be killed in any hook; run as a program by the test of SIGKILL."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F

from lightning_kfc import ExponentialSchedule, KFCCallback
from tests.helpers.lightning_nets import Regression, loader, trainer, vectors


class ByStep(Regression):
    """Takes its data from the step's number, so that a resumed run sees what the uninterrupted one saw."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = vectors(4, seed=1000 * self.trainer.current_epoch + batch_idx).tensors
        return F.cross_entropy(self(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Killed(Callback):
    """Ends the process without a word, in a hook of the tenth step or of what follows it."""

    def __init__(self, hook: str) -> None:
        def kill(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.fit_loop.total_batch_idx >= 9:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, hook, kill)


def new_callback(**options: Any) -> KFCCallback:
    """Dates of statistics (0-2, 4, 8, 12) and inverses (0-2, 3, 6, 12) that fall apart."""
    defaults: dict[str, Any] = {
        "damping": ExponentialSchedule(0.1, 0.01, 10),
        "warmup_steps": 3,
        "factor_every_n_steps": 4,
        "inverse_every_n_steps": 6,
    }
    return KFCCallback(**{**defaults, **options})


def run(folder: str, *callbacks: Any, callback: Any = None, ckpt_path: str | None = None, **options: Any) -> Any:
    """Train for two epochs of seven batches; checkpoints of every step go to ``folder``."""
    torch.manual_seed(11)
    module = ByStep()
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callback = callback or new_callback()
    fitted = trainer(callback, *callbacks, saving, enable_checkpointing=True, max_epochs=2, **options)
    fitted.fit(module, loader(vectors(28)), ckpt_path=ckpt_path)
    return module, callback, fitted


if __name__ == "__main__":
    for name in sys.argv[2:]:
        child = os.fork()
        if not child:
            run(os.path.join(sys.argv[1], name), Killed(name))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(name, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "was not killed")
