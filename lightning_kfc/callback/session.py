"""Everything that exists from the start of a fit to its end."""

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
    """Holds what is attached to a trainer and counted while it fits.

    Args:
        callback: The callback; its hooks take part while it is among the trainer's callbacks.
        kfc: The engine.
        trainer: The trainer.
        pl_module: The module that is trained.
        logging: What is logged and drawn.

    Attributes:
        report: Pictures and the report.
        metrics: Sends numbers to loggers.
        notices: Messages that are given once.
        capture: Opens the engine's capture around each training step.
        loss_gradients: The loss's own gradients at the next step, by the parameters' id, where another callback
            replaces them first.
    """

    def __init__(self, callback: object, kfc: KFC, trainer: Any, pl_module: Any, logging: Logging) -> None:
        self._kfc = kfc
        self.report = Report(logging, kfc, trainer, pl_module)
        self.metrics = MetricsLogger(logging, kfc, trainer, pl_module, self.report)
        self.notices = Notices()
        self.capture = TrainingStepCapture(trainer, callback, kfc, self.report, self.notices)
        self.loss_gradients: dict[int, Tensor] = {}
        self._backwards = 0
        self._stepped_at: dict[int, int] = {}

    def backward_ends(self) -> None:
        """Count a backward: each optimizer's gradients are fresh once more."""
        self._backwards += 1
        self.capture.backward_ends()

    def step_begins(self, optimizer: Optimizer) -> bool:
        """Note the step of an optimizer.

        Returns:
            Whether a backward has come since its last step. SWA's extra epoch, for one, steps without.
        """
        self.capture.step_begins(optimizer)
        fresh = self._stepped_at.get(id(optimizer), 0) != self._backwards
        self._stepped_at[id(optimizer)] = self._backwards
        return fresh

    def take_loss_gradients(self) -> dict[int, Tensor]:
        """The loss's own gradients, which are held no longer."""
        taken, self.loss_gradients = self.loss_gradients, {}
        return taken

    def close(self) -> None:
        """Leave trainer and engine as they are between fits."""
        self.capture.detach()
        self._kfc.batches.resume()
        self._kfc.batches.release()
