"""The objects that live for one fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.callback.metrics_logging import MetricsLogger
from lightning_kfc.callback.notices import Notices
from lightning_kfc.callback.training_step import TrainingStepCapture
from lightning_kfc.kfc import KFC
from lightning_kfc.reporting.options import Logging
from lightning_kfc.reporting.report import Report


class FitSession:
    """The objects that a callback attaches to a trainer for one fit.

    Args:
        callback: The callback; the capture is active while the trainer has it.
        kfc: The engine.
        trainer: The trainer.
        pl_module: The module that is trained.
        logging: What is logged and drawn.

    Attributes:
        trainer: The trainer.
        report: Pictures and the report.
        metrics: Sends numbers to loggers.
        notices: Messages that are logged once.
        capture: Opens the engine's capture around each training step.
        loss_gradients: The loss's gradients at the next step, by id of the parameter, if another callback
            replaces them first.
    """

    def __init__(self, callback: object, kfc: KFC, trainer: Any, pl_module: Any, logging: Logging) -> None:
        self._kfc = kfc
        self.trainer = trainer
        self.report = Report(logging, kfc, trainer, pl_module)
        self.metrics = MetricsLogger(logging, kfc, trainer, pl_module, self.report)
        self.notices = Notices()
        self.capture = TrainingStepCapture(trainer, callback, kfc, self.report, self.notices)
        self.loss_gradients: dict[int, Tensor] = {}
        self._backwards = 0
        self._stepped_at: dict[int, int] = {}

    def backward_ends(self) -> None:
        """Count a backward; the gradients of all optimizers are new."""
        self._backwards += 1
        self.capture.backward_ends()

    def step_begins(self, optimizer: Optimizer) -> bool:
        """Note the step of an optimizer.

        Returns:
            Whether a backward ran since its last step. The extra epoch of SWA steps without one.
        """
        self.capture.step_begins(optimizer)
        fresh = self._stepped_at.get(id(optimizer), 0) != self._backwards
        self._stepped_at[id(optimizer)] = self._backwards
        return fresh

    def take_loss_gradients(self) -> dict[int, Tensor]:
        """Return the loss's gradients, and forget them."""
        taken, self.loss_gradients = self.loss_gradients, {}
        return taken

    def close(self) -> None:
        """Detach from the trainer and release the engine's recorded graph."""
        self.capture.detach()
        self._kfc.batches.resume()
        self._kfc.batches.release()
