"""Log metrics and advice during fit."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_kfc.callback.clipping_watch import ClippingWatch
from lightning_kfc.callback.lightning_internals import logged_step
from lightning_kfc.callback.loss_scale import gradient_scaler
from lightning_kfc.kfc import KFC
from lightning_kfc.monitoring.advice import FIRST_STEPS, Adviser
from lightning_kfc.monitoring.messages import inform
from lightning_kfc.reporting.diagnostics import LOGGED, Diagnostics
from lightning_kfc.reporting.options import Logging
from lightning_kfc.reporting.report import Report

#: Logged steps between two evaluations of the rules of advice, which also run when training ends.
ADVISE_EVERY = 10


class MetricsLogger:
    """Sends the numbers of one fit to loggers and to the progress bar, and logs advice.

    Args:
        options: The options of what is logged.
        kfc: The engine.
        trainer: The trainer.
        module: The module that is trained.
        reports: Takes numbers and advice for the report.
    """

    def __init__(self, options: Logging, kfc: KFC, trainer: Any, module: Any, reports: Report) -> None:
        self._options = options
        self._kfc = kfc
        self._trainer = trainer
        self._reports = reports
        self._diagnostics = Diagnostics(kfc, layers=options.layers)
        self._adviser = Adviser()
        self._clipping = ClippingWatch(trainer, module)
        self._logged = 0

    def count_from_here(self) -> None:
        """Count events from now on, without those before the checkpoint."""
        self._diagnostics.count_from_here()

    def _step(self) -> int:
        return logged_step(self._trainer)

    def _due(self) -> bool:
        every = self._trainer.log_every_n_steps
        return bool(every) and self._step() % every == 0

    def before_step(self) -> None:
        """Before a step is preconditioned: compute further diagnostics if the step is logged."""
        self._diagnostics.begin_step(look=self._due())

    def after_step(self, pl_module: Any, optimizer: Optimizer) -> None:
        """After a step is preconditioned: log its numbers, if due.

        Args:
            pl_module: The module that is trained.
            optimizer: The optimizer whose gradients were preconditioned.
        """
        self._diagnostics.end_step()
        self._clipping.preconditioned(optimizer)
        step = self._kfc.last_step
        if self._options.progress_bar and step is not None:
            bar = {"kfc_nu": step.kl_clip_factor, "kfc_damping": step.damping}
            pl_module.log_dict(bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        if self._kfc.step == FIRST_STEPS:
            self.advise()
        if not self._due() or step is None:
            return
        numbers = self._diagnostics.numbers()
        self._reports.numbers(self._step(), numbers)
        for logger in self._trainer.loggers:
            logger.log_metrics(self._to_log(numbers), step=self._step())
        self._logged += 1
        if self._logged % ADVISE_EVERY == 0:
            self.advise()

    def _to_log(self, numbers: dict[str, float]) -> dict[str, float]:
        if not self._options.layers:
            return {name: numbers[name] for name in LOGGED if name in numbers}
        sent = self._kfc.communication.as_metrics() if self._trainer.world_size > 1 else {}
        return {**numbers, **sent}

    def batch_ends(self) -> None:
        """After a batch: compare updates before and after clipping."""
        if self._clipping.stepped(self._trainer.optimizers):
            self.advise()

    def advise(self) -> None:
        """Log the advice of rules that have given none before."""
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        facts = self._diagnostics.facts(
            gradient_scaler=gradient_scaler(self._trainer) is not None,
            gradient_clip_factors=self._clipping.factors(),
            momentum=max((float(group.get("momentum") or 0) for group in groups), default=0.0),
        )
        for sentence in self._adviser.new(facts):
            inform(f"KFC advice: {sentence}")
        self._reports.advice = tuple(self._adviser.given)
