"""The callback's hooks, written once for the packages ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.callback import start_up
from lightning_kfc.callback.averaged_weights import AveragedWeights, averaged_weights
from lightning_kfc.callback.lightning_internals import accumulates, data_parallel_group, logged_step, resumed_from
from lightning_kfc.callback.loss_scale import gradient_scale, gradient_scaler, loss_scale
from lightning_kfc.callback.options import STATE_KEY, KFCOptions
from lightning_kfc.callback.session import FitSession
from lightning_kfc.kfc import KFC
from lightning_kfc.monitoring.events import History, listed

#: The part of the callback's state that belongs to averaged weights.
AVERAGED = "averaged_weights"


class KFCHooks(KFCOptions):  # noqa: D101 (the docstring is that of the options)
    __doc__ = KFCOptions.__doc__

    # Class attributes, since a copy restores the options alone.
    _kfc: KFC | None = None
    _module: Any = None
    _history: History | None = None
    _session: FitSession | None = None
    _average: AveragedWeights | None = None
    _loaded: dict[str, Any] | None = None

    @property
    def kfc(self) -> KFC:
        """The preconditioner.

        Raises:
            RuntimeError: Before fitting has started.
        """
        if self._kfc is None:
            raise RuntimeError("KFCCallback.kfc exists only after trainer.fit() has started.")
        return self._kfc

    @property
    def report_history(self) -> History:
        """The numbers over time that the report draws; it also draws numbers that you add.

        Raises:
            RuntimeError: Before fitting has started.
        """
        if self._history is None:
            raise RuntimeError("KFCCallback.report_history exists only after trainer.fit() has started.")
        return self._history

    def checkpoint_bytes(self) -> int:
        """The bytes that this callback adds to a checkpoint, once training has started.

        They hold the factors and inverses, and with averaged weights also the weights that train.
        """
        averaged = self._average.checkpoint_bytes() if self._average is not None else 0
        return averaged + (self.kfc.coverage().bytes if self._save_factors else 0)

    @property
    def _fit(self) -> FitSession:
        assert self._session is not None, "made in on_fit_start"
        return self._session

    # From the start of fit to its end.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies that cannot work; forget a state that was loaded before this fit."""
        if stage != "fit" and self._is_foreign(trainer):
            return
        if self._average is not None:
            self._average.detach()
        if stage == "fit":
            self._loaded = None
            self._average = None
            start_up.refuse_strategy(trainer.strategy)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find and prepare the layers; a second fit of the same module continues the first one."""
        self._end()
        start_up.refuse_optimizers(trainer.optimizers)
        together = _together(trainer)
        start_up.refuse_shared_folder(self.logging.report_dir, [each.logging.report_dir for each in together])
        previous = self._kfc.state_dict() if self._kfc is not None and self._module is pl_module else None
        self._kfc = KFC(pl_module, settings=self._settings, process_group=data_parallel_group(trainer.strategy))
        self._module = pl_module
        if previous is not None:
            self._take_over(previous)
        self._session = FitSession(self, self._kfc, trainer, pl_module, self.logging)
        self._history = self._session.report.measured.history

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the checkpoint's state, which FSDP2 loads after on_fit_start, and log the start-up report."""
        self._fit.capture.training = True
        # The module's own on_fit_start runs after ours, and may change layers.
        self.kfc.follow_structure()
        together = _together(trainer)
        # The callbacks after this one have not followed the module yet.
        if together[-1] is self:
            start_up.refuse_overlap(pl_module, [(each.state_key, each.kfc) for each in together])
        self._average = self._fit.capture.average = averaged_weights(self, trainer, pl_module)
        if self._loaded is not None:
            self._take_over(self._loaded)
            self._loaded = None
        elif (checkpoint := resumed_from(trainer)) is not None:
            self.kfc.restart()
            rank_zero_info(
                f"KFCCallback: the checkpoint {checkpoint} holds no state of this callback. "
                "The estimate of the curvature starts again with a warm-up."
            )
        start_up.show_information()
        self._fit.metrics.count_from_here()
        self._fit.report.measured.ignore()
        start_up.announce(self.kfc, trainer, pl_module, save_factors=self._save_factors, average=self._average)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Update the averages for parameters that were added or removed."""
        self._fit.report.measured.epoch_ends(logged_step(trainer) - 1)
        if self._average is not None:
            self._average.follow_structure()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """During fit, leave the validation out of the times."""
        if self._trains:
            self._fit.report.measured.ignore()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """During fit, note the validation's numbers."""
        if self._trains and not self._is_foreign(trainer):
            self._fit.report.measured.validation_ends(logged_step(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the last epoch's numbers."""
        self._fit.report.measured.epoch_ends(logged_step(trainer) - 1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and log the counted events, advice and the report's path."""
        session = self._fit
        self._end()
        if self._average is not None:
            self._average.detach()
        events = self.kfc.events
        if counts := str(events):
            shortened = events.undone_steps or events.shortened_steps
            usual = " A few undone or shortened steps are usual." if shortened else ""
            rank_zero_info(f"KFC counted events: {counts}.{usual}")
        session.metrics.advise()
        if (path := session.report.write()) is not None:
            rank_zero_info(f"KFC wrote its report to {path}.")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach."""
        if not self._is_foreign(trainer):
            self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach, since Lightning calls no teardown after an exception, and write the report."""
        if self._is_foreign(trainer):
            return
        session = self._session
        if self._average is not None and self._trains:
            self._average.take_out()
        self._end()
        if session is not None:
            session.report.write(interrupted_by=exception)

    def _is_foreign(self, trainer: Any) -> bool:
        """Whether a trainer is not that of the present fit, in whose hooks it validates, for example."""
        return self._session is not None and self._session.trainer is not trainer

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    # A training step.

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock if steps are timed."""
        self._fit.report.step_begins()
        self._fit.capture.batch_begins()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Take the statistics of this loss, while its graph lives."""
        fraction = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        self.kfc.batches.follow_gradients()
        with self._fit.report.seeds():
            self.kfc.back_propagate(loss, loss_scale=loss_scale(trainer), loss_fraction=fraction)
        if pl_module.automatic_optimization and not accumulates(trainer):
            for optimizer in trainer.optimizers:
                self.kfc.refreshes.begin(optimizer)
        self.kfc.batches.pause()
        self._fit.capture.backward_begins()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Fold a complete step's statistics into the factors and refresh inverses, after the graph's memory is free."""
        self._fit.backward_ends()
        self.kfc.batches.resume()
        # In manual optimization statistics are complete at the optimizer's step.
        if pl_module.automatic_optimization and not accumulates(trainer):
            for optimizer in trainer.optimizers:
                self.kfc.refreshes.if_finite(optimizer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Replace this optimizer's gradients; in manual optimization, fold its layers' statistics first."""
        session = self._fit
        if not session.step_begins(optimizer):
            if not pl_module.automatic_optimization:
                if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                    session.capture.warn_of_unseen_backward()
                self.kfc.skip(optimizer)
            return
        session.metrics.before_step()
        self._share_gradients(trainer, optimizer)
        scale, gradients = gradient_scale(trainer, optimizer), session.take_loss_gradients()
        if self.kfc.precondition(optimizer=optimizer, loss_scale=scale, loss_gradients=gradients):
            session.metrics.after_step(pl_module, optimizer)
        elif gradient_scaler(trainer) is None:
            # A gradient scaler skips such a step by itself; optimizers skip parameters without a gradient.
            session.notices.warn(
                "KFCCallback skips this optimizer step: its gradients are not finite. Later skipped steps are only "
                "counted, in `callback.kfc.events`."
            )
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _share_gradients(self, trainer: Any, optimizer: Optimizer) -> None:
        """Give all callbacks a copy of the loss's gradient, since the first of them replaces it."""
        together = _together(trainer)
        if len(together) < 2 or together[0] is not self:
            return
        if not any(callback.kfc.reviewer.recording for callback in together):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {id(p): p.grad.clone() for p in parameters if p.grad is not None}
        for callback in together:
            callback._fit.loss_gradients = gradients

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Release the graph of recorded calls that were not used."""
        self.kfc.batches.release()
        self._fit.metrics.batch_ends()
        self._fit.report.step_ends(logged_step(trainer), outputs)

    # State.

    @property
    def _trains(self) -> bool:
        return self._session is not None and self._session.capture.training

    def _take_over(self, state: dict[str, Any]) -> None:
        averaged = state.get(AVERAGED)
        for problem in self.kfc.load_state_dict({key: value for key, value in state.items() if key != AVERAGED}):
            rank_zero_warn(f"KFCCallback: {problem}.")
        if averaged:
            # Also without averaging, since the module holds averages, and training continues from its own weights.
            average = self._average or AveragedWeights(self._module, 0.0)
            if unknown := average.load_state_dict(averaged):
                rank_zero_info(
                    f"KFCCallback: {listed(unknown)} of the checkpoint are not in the model or have another shape. "
                    "The model's own values are trained."
                )

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take over the state of callbacks that this run does not have, such as one with another ``include``.

        Else the weights that train would be lost with it. Of several callbacks the last one does, which averages, with
        the factors of its own layers.
        """
        together = _together(trainer)
        if together[-1] is not self:
            return
        present, states = {callback.state_key for callback in together}, checkpoint["callbacks"]
        named = [key for key in states if key == STATE_KEY or key.startswith(f"{STATE_KEY}{{")]
        taken: dict[str, Any] = {}
        for key in [key for key in named if key not in present]:
            layers = {**(taken.get("layers") or {}), **(states[key].get("layers") or {})}
            taken = {**taken, **states[key], "layers": layers or None}
            rank_zero_info(f"KFCCallback: {self.state_key} takes over the state of {key}, which this run has not.")
        if taken:
            # The own state, if there is one, comes first. Lightning loads the states after this hook.
            states[self.state_key] = {**taken, **states.get(self.state_key, {})}

    def state_dict(self) -> dict[str, Any]:
        """The preconditioner's state in plain tensors, numbers, strings, dicts and lists."""
        if self._loaded is not None:
            return self._loaded
        if self._kfc is None:
            return {}
        state = self._kfc.state_dict(factors=self._save_factors)
        averaged = self._average.state_dict() if self._average is not None else {}
        return {**state, AVERAGED: averaged} if averaged else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts; while training runs, restore it at once."""
        if self._trains:
            self._take_over(state_dict)
        else:
            self._loaded = state_dict


def _together(trainer: Any) -> list[KFCHooks]:
    """All callbacks of this package among a trainer's, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, KFCHooks)]
