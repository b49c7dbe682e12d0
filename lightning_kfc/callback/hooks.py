"""The callback's hooks, written once for the packages ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.callback.metrics_logging import MetricsLogger, MetricsLoggerSettings
from lightning_kfc.callback.optimizer_advice import OptimizerWarning, warning_for_run, warnings_for
from lightning_kfc.callback.schedule_preview import schedules_of
from lightning_kfc.callback.training_step import Attachment
from lightning_kfc.curvature.coverage import wrapped
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.kfc import KFC
from lightning_kfc.losses.likelihoods import Bernoulli, Categorical, Gaussian
from lightning_kfc.monitoring.events import History
from lightning_kfc.monitoring.messages import LOGGER
from lightning_kfc.reporting.report import Report, ReportSettings
from lightning_kfc.scheduling.refresh_schedule import ExponentialSchedule, LinearSchedule
from lightning_kfc.settings import refuse_removed, setting_names, settings_of
from lightning_kfc.utilities.checks import check_flag

#: Strategies that own the backward or the parameters in a way that leaves no room for us, with the way out.
REFUSED_STRATEGIES = {
    "FSDPStrategy": "use ModelParallelStrategy (FSDP2) instead",
    "DeepSpeedStrategy": "use DDPStrategy, or ModelParallelStrategy for sharding",
    "XLAFSDPStrategy": "use an XLA strategy without sharding",
}


class KFCHooks:
    r"""Preconditions gradients with KFC (Grosse & Martens 2016), whatever the module and its optimizer.

    Add it to ``Trainer(callbacks=[KFCCallback()])``. The optimizer stays the module's own; SGD with momentum is
    the paper's, and ``SGD(lr=0.5, momentum=0.5)`` is a good start. With several optimizers, each step
    preconditions the parameters of its own optimizer; their losses go through ``self.manual_backward(loss)``.

    Lightning's learning-rate finder and batch-size scaler run without other callbacks: what they find is the
    learning rate of the optimizer alone, and the largest batch that fits without the memory of the factors.

    A copied or unpickled callback has the settings, and starts anew.

    Args:
        damping: Added to the curvature before it is inverted: larger is closer to plain SGD, smaller closer
            to the full natural gradient. "auto": set by how well steps do what was expected of them. Else a number,
            or a schedule over optimizer steps.
        fisher: Whose targets the curvature is taken with. "mc": sampled from the model; "exact": all
            possible ones, at one back-propagation each; "empirical": the data's.
        likelihood: What the loss is the negative logarithm of. "auto" recognises it by the loss functions
            called in `training_step`; where it recognises none, the curvature comes from the loss's own gradient. A
            likelihood object with `output_of` names the module whose output is the logits, for losses that are
            computed otherwise.
        factor_every_n_steps: Curvature statistics are taken every so many optimizer steps. "auto": chosen soon after
            the warm-up, by the time that the parts of a step have taken, to keep to `max_overhead`.
        inverse_every_n_steps: Inverses are refreshed every so many optimizer steps, or "auto".
        warmup_steps: During the first so many optimizer steps, statistics are taken at every step.
        ema_decay: Decay of the running averages of the statistics, at least 0 and below 1.
        kl_clip: Bound on the size of a step, measured in how much it changes the model's predictions. "auto": set as
            damping is; null for none.
        inverse: How the damped curvature is inverted. "cholesky": damping split over both factors, the cheapest;
            "eigh": damping applied exactly; "ekfac": also with the second moments of single examples' gradients.
        rule: How gradients and inverses make an update. "natural": the paper's. "adam": Adam in the eigenbasis of the
            curvature, beside the same optimizer. "auto": "adam" for models with attention, unless they are wide, else
            "natural".
        weight_sharing: "expand": each use of a weight counts by itself; "reduce": the uses by an example count as one.
        max_factor_dim: A layer's factor with more dimensions than this is kept as its diagonal; null for no bound.
        rows_per_dim: Where a batch has more rows (locations of images, positions of sequences) for each dimension of a
            layer's input factor than this, the factor comes from a part of them; null for all rows.
        include: Glob patterns over module names, such as "encoder.*": only these modules are preconditioned.
        exclude: Glob patterns over module names that are not preconditioned.
        seed: Seed of the sampled targets. The global random stream is never touched.
        placement: Which of several ranks hold a layer's factors and inverse. "comm-opt": all; "mem-opt": one, which
            sends the preconditioned gradient at every step; a number: that fraction of the ranks; "auto": "mem-opt"
            where parameters are sharded, else "comm-opt".
        reduce_precision: How statistics travel between ranks. "full": as they are; "bfloat16": at half the bytes.
        stagger_inverses: Whether layers refresh their inverses at different steps of the period, so that no step takes
            as long as all of them together.
        inverse_precision: The precision of inverses, and of the products that each step makes with them: "full", or
            "bfloat16" (with inverse "cholesky") at half the memory, and faster where the hardware has it.
        max_overhead: By which share a step may take longer in the mean, where a period is "auto".
        save_factors: Whether checkpoints hold the factors and inverses. Without them checkpoints stay small, and a
            resumed run warms up again.
        pictures_every_n_steps: Every so many optimizer steps, pictures of the curvature go to each logger that takes
            figures (TensorBoardLogger does), and into `report_dir`; null for none. Needs the extra "pictures".
        report_dir: A folder for a report of the training, one HTML file written when it ends; null for none. Needs the
            extra "pictures".
        log_layers: Whether loggers get numbers for each layer, besides the smallest, the median and the largest one.
        progress_bar: Whether the progress bar shows the factor of the KL clip, and the damping.
        **removed: Settings of earlier versions, which are errors that say what became of them.

    Raises:
        ModuleNotFoundError: If pictures or a report are asked for and matplotlib is not installed.
        TypeError: If a setting is of the wrong type, or there is no such setting.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        damping: float | Literal["auto"] | ExponentialSchedule | LinearSchedule = "auto",
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"]
        | Categorical
        | Bernoulli
        | Gaussian = "auto",
        factor_every_n_steps: int | Literal["auto"] = 10,
        inverse_every_n_steps: int | Literal["auto"] = 20,
        warmup_steps: int = 10,
        ema_decay: float = 0.8,
        kl_clip: float | Literal["auto"] | None = "auto",
        inverse: Literal["cholesky", "eigh", "ekfac"] = "cholesky",
        rule: Literal["auto", "natural", "adam"] = "auto",
        weight_sharing: Literal["expand", "reduce"] = "expand",
        max_factor_dim: int | None = 10_000,
        rows_per_dim: int | None = 8,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        placement: Literal["auto", "comm-opt", "mem-opt"] | float = "auto",
        reduce_precision: Literal["full", "bfloat16"] = "full",
        stagger_inverses: bool = True,
        inverse_precision: Literal["full", "bfloat16"] = "full",
        max_overhead: float = 0.15,
        save_factors: bool = True,
        pictures_every_n_steps: int | None = None,
        report_dir: str | None = None,
        log_layers: bool = False,
        progress_bar: bool = False,
        **removed: Any,
    ) -> None:
        given = dict(locals())
        super().__init__()
        refuse_removed("KFCCallback", removed)
        self._settings = settings_of("KFCCallback", None, {name: given[name] for name in setting_names()})
        check_flag("save_factors", save_factors)
        self._save_factors = save_factors
        self._report_settings = ReportSettings(pictures_every_n_steps, report_dir)
        self._logger_settings = MetricsLoggerSettings(log_layers, progress_bar)
        self._start_detached()

    def _start_detached(self) -> None:
        self._kfc: KFC | None = None
        self._module: Any = None
        self._loaded: dict[str, Any] | None = None
        self._attachment: Attachment | None = None
        self._reporting: Report | None = None
        self._metrics_logger: MetricsLogger | None = None
        self._training = False
        self._backwards = 0
        self._preconditioned_at: dict[int, int] = {}
        self._loss_gradients: dict[int, Tensor] = {}
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: a copy must hold neither the model nor anything that is attached to it."""
        return {
            "settings": self._settings,
            "save_factors": self._save_factors,
            "report": self._report_settings,
            "metrics": self._logger_settings,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings = state["settings"]
        self._save_factors = state["save_factors"]
        self._report_settings = state["report"]
        self._logger_settings = state["metrics"]
        self._start_detached()

    @property
    def kfc(self) -> KFC:
        """The preconditioner.

        Raises:
            RuntimeError: Before fitting has started.
        """
        if self._kfc is None:
            raise RuntimeError("KFCCallback has no preconditioner before trainer.fit() starts.")
        return self._kfc

    @property
    def report_history(self) -> History:
        """The numbers over time that the report draws; numbers added to it, under any key, are drawn too.

        Raises:
            RuntimeError: Before fitting has started.
        """
        if self._reporting is None:
            raise RuntimeError("KFCCallback has no history before trainer.fit() starts.")
        return self._reporting.history

    @property
    def _reports(self) -> Report:
        assert self._reporting is not None, "set in on_fit_start"
        return self._reporting

    @property
    def _metrics(self) -> MetricsLogger:
        assert self._metrics_logger is not None, "set in on_fit_start"
        return self._metrics_logger

    def checkpoint_bytes(self) -> int:
        """How many bytes of factors and inverses a checkpoint of this training holds; known once it has started."""
        return sum(row.bytes for row in self.kfc.coverage()) if self._save_factors else 0

    @property
    def state_key(self) -> str:
        """Two callbacks in one trainer need different keys; what they include is what tells them apart."""
        include = self._settings.include
        return "KFCCallback" if include is None else f"KFCCallback{{include={list(include)!r}}}"

    # From the start of fit to its end.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work; forget a state that another entry point than fit has loaded."""
        if stage != "fit":
            return
        self._loaded = None
        for cls in type(trainer.strategy).__mro__:
            if cls.__name__ in REFUSED_STRATEGIES:
                name, way_out = type(trainer.strategy).__name__, REFUSED_STRATEGIES[cls.__name__]
                raise ValueError(f"KFCCallback does not work with {name}: {way_out}.")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers and prepare them; a second fit of the same module goes on where the first one ended."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "KFCCallback does not work with LBFGS, which evaluates several points in a step and builds its own "
                    "curvature. Use SGD(lr=0.5, momentum=0.5), or train without the callback."
                )
        previous = self._kfc.state_dict() if self._kfc is not None and self._module is pl_module else None
        self._kfc = self._new_engine(trainer, pl_module)
        self._module = pl_module
        if previous is not None:
            self._take_over(previous)
        self._end()
        self._backwards = 0
        self._preconditioned_at.clear()
        self._said.clear()
        self._reporting = reporting = Report(self._report_settings, lambda: self.kfc, trainer, pl_module)
        self._metrics_logger = MetricsLogger(self._logger_settings, lambda: self.kfc, trainer, pl_module, reporting)
        self._attachment = Attachment(
            trainer,
            # The learning-rate finder, for one, takes the other callbacks out while it runs; and before training starts
            # a sharded optimizer's state is loaded by way of a step that moves nothing.
            active=lambda: self._training and any(callback is self for callback in trainer.callbacks),
            kfc=lambda: self.kfc,
            on_unseen_backward=self._warn_bare_backward,
            on_unseen_step=self._after_unseen_step,
            on_repeated_closure=self._say_repeated_closure,
            observing=reporting.observing,
        )

    def _new_engine(self, trainer: Any, pl_module: Any) -> KFC:
        return KFC(pl_module, settings=self._settings, process_group=_data_parallel_group(trainer.strategy))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the checkpoint's state (under FSDP2 it is loaded after on_fit_start), and report."""
        self._training = True
        # The module's own on_fit_start comes after ours.
        self.kfc.follow_structure()
        if self._loaded is not None:
            self._take_over(self._loaded)
            self._loaded = None
        elif _resumed_from(trainer) is not None:
            self._kfc = self._new_engine(trainer, pl_module)
            rank_zero_info(
                f"KFCCallback: the checkpoint {_resumed_from(trainer)} holds no state of this callback; "
                "curvature is estimated anew, beginning with a warm-up."
            )
        _show_information()
        self._metrics.engine_replaced()
        self._do_without_reviews(pl_module)
        self._warn_of_split_layers(trainer.optimizers)
        rank_zero_info(self._report())
        self._advise(trainer)

    def _advise(self, trainer: Any) -> None:
        said: dict[OptimizerWarning, None] = {}
        steps = _planned_steps(trainer) - trainer.global_step
        for optimizer in trainer.optimizers:
            covered = {id(p) for name in self.kfc.learning_rates(optimizer) for p in self.kfc.layers[name].parameters()}
            groups = [group for group in optimizer.param_groups if covered & set(map(id, group["params"]))]
            schedules = schedules_of(trainer, self._module, optimizer)
            found = warnings_for(optimizer, self.kfc.settings, groups=groups, schedules=schedules, steps=steps)
            said |= dict.fromkeys(found)
        if self.kfc.step == 0 and (short := warning_for_run(self.kfc.settings, steps)) is not None:
            said[short] = None
        for each in said:
            tell = rank_zero_warn if each.severe else rank_zero_info
            tell(f"KFCCallback: {each.text}")

    def _take_over(self, state: dict[str, Any]) -> None:
        for problem in self.kfc.load_state_dict(state):
            rank_zero_warn(f"KFCCallback: {problem}.")

    def _report(self) -> str:
        coverage, choice = self.kfc.coverage(), self.kfc.rule_choice
        lines = [f"KFC preconditions these layers:\n{coverage}"]
        if choice.reason:
            lines += wrapped(f"rule='auto' is {choice.rule!r}: {choice.reason}.")
        if self._save_factors:
            size = f"{self.checkpoint_bytes() / 1e6:.3f} MB"
            lines += wrapped(f"Each checkpoint holds the factors and inverses, {size} (save_factors=False: none).")
        else:
            lines += wrapped("Checkpoints hold no factors (save_factors=False): a resumed run warms up again.")
        return "\n".join(lines)

    def _warn_of_split_layers(self, optimizers: Sequence[Any]) -> None:
        owned = [self.kfc.learning_rates(optimizer) for optimizer in optimizers]
        known = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
        for name, layer in self.kfc.layers.items():
            own = {id(p) for p in layer.adapter.own_parameters().values()}
            if own and not any(name in rates for rates in owned) and any(own & ids for ids in known):
                rank_zero_warn(
                    f"KFCCallback leaves the gradient of {name!r} as it is: no optimizer has all of its parameters. "
                    "Give its weight and its bias to the same optimizer, or add it to `exclude` to silence this."
                )

    def _do_without_reviews(self, pl_module: Any) -> None:
        if not any(map(is_sharded, pl_module.parameters())):
            return
        message = self.kfc.reviewer.end("the parameters of the model are sharded over ranks")
        if message:
            rank_zero_info(message)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and tell what went other than planned."""
        self._end()
        if events := str(self.kfc.events):
            rank_zero_info(f"KFC counted events: {events}.")
        self._metrics.advise(gradient_scaler=self._scaler(trainer) is not None)
        if self._reporting is not None and (path := self._reporting.write()) is not None:
            rank_zero_info(f"KFC wrote its report to {path}.")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach: after an exception there is no teardown. A report tells of what came before it."""
        self._end()
        if self._reporting is not None:
            self._reporting.write(interrupted_by=exception)

    def _end(self) -> None:
        self._training = False
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
        if self._kfc is not None:
            self._kfc.resume()
            self._kfc.release()

    # A training step.

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock, where the time of steps is wanted."""
        self._reports.step_begins()
        if self._attachment is not None:
            self._attachment.batch_begins()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Take the statistics of this loss, while its graph lives."""
        fraction = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        self.kfc.follow_gradients()
        with self._reports.seeds():
            self.kfc.back_propagate(loss, loss_scale=self._loss_scale(trainer), loss_fraction=fraction)
        if pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            for optimizer in trainer.optimizers:
                self.kfc.begin_refresh(optimizer)
        self.kfc.pause()
        if self._attachment is not None:
            self._attachment.backward_begins()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Fold a complete step's statistics into the factors and refresh inverses, the graph's memory being free."""
        self._backwards += 1
        if self._attachment is not None:
            self._attachment.backward_ends()
        self.kfc.resume()
        # In manual optimization only the step of each optimizer says that its own layers' statistics are complete.
        if pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            for optimizer in trainer.optimizers:
                self.kfc.refresh_if_finite(optimizer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Replace this optimizer's gradients; in manual optimization, first fold what its step completes."""
        if self._attachment is not None:
            self._attachment.step_begins(optimizer)
        if self._preconditioned_at.get(id(optimizer), 0) == self._backwards:
            # SWA's extra epoch, for one, comes here without a backward: these gradients are not fresh.
            if not pl_module.automatic_optimization:
                self._warn_bare_backward()
                self.kfc.skip(optimizer)
            return
        self._preconditioned_at[id(optimizer)] = self._backwards
        self._metrics.before_step()
        self._share_gradients(trainer, optimizer)
        scale, gradients = self._gradient_scale(trainer, optimizer), self._loss_gradients
        self._loss_gradients = {}
        if self.kfc.precondition(optimizer=optimizer, loss_scale=scale, loss_gradients=gradients):
            self._metrics.after_step(pl_module, optimizer, gradient_scaler=self._scaler(trainer) is not None)
        elif self._scaler(trainer) is None:
            # A gradient scaler skips such a step by itself; no optimizer steps a parameter without a gradient.
            self._warn_skipped()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _share_gradients(self, trainer: Any, optimizer: Optimizer) -> None:
        """Let the reviews of several callbacks see the gradient of the loss, which the first of them replaces."""
        together = [callback for callback in trainer.callbacks if isinstance(callback, KFCHooks)]
        if len(together) < 2 or together[0] is not self or not any(callback.kfc.recording for callback in together):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {id(p): p.grad.clone() for p in parameters if p.grad is not None}
        for callback in together:
            callback._loss_gradients = gradients

    def _warn_skipped(self) -> None:
        if self.kfc.events.nonfinite_gradients == 1:
            rank_zero_warn(
                "KFCCallback: the gradients of this optimizer step are not finite; the step is skipped, since it would "
                "spoil the weights. Further skipped steps are only counted, in `callback.kfc.events`."
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the graph of what was recorded and not used."""
        self.kfc.release()
        self._metrics.batch_ends(gradient_scaler=self._scaler(trainer) is not None)
        self._reports.step_ends(trainer.fit_loop.epoch_loop._batches_that_stepped, outputs)

    def _warn_bare_backward(self) -> None:
        self._warn_once(
            "KFCCallback takes no curvature from, and does not precondition, the gradient of a backward that does not "
            "go through Lightning. Call self.manual_backward(loss) instead of loss.backward()."
        )

    def _after_unseen_step(self, optimizer: Optimizer) -> None:
        self._warn_once(
            f"KFCCallback could not precondition a step of {type(optimizer).__name__}: it was made around Lightning's "
            "wrapped optimizer (by optimizers(use_pl_optimizer=False), optimizer.optimizer.step(), the second_step() "
            "of an optimizer such as SAM, or an overridden optimizer_step that steps on its own). Call step() of what "
            "self.optimizers() returns, or "
            "super().optimizer_step(...)."
        )
        self.kfc.skip(optimizer)

    def _say_repeated_closure(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if name not in self._said:
            self._said.add(name)
            rank_zero_info(
                f"KFCCallback: {name} evaluates its closure several times in a step. The gradient of each is "
                "preconditioned; curvature and reviews are taken from the first."
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(message)

    def _scaler(self, trainer: Any) -> Any:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _loss_scale(self, trainer: Any) -> float:
        scaler = self._scaler(trainer)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _gradient_scale(self, trainer: Any, optimizer: Optimizer) -> float:
        """What gradients are multiplied by in on_before_optimizer_step: fused optimizers unscale in their step."""
        return self._loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The preconditioner's state in plain tensors, numbers, strings, dicts and lists."""
        if self._loaded is not None:
            return self._loaded
        return self._kfc.state_dict(factors=self._save_factors) if self._kfc is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts; one that is loaded while it runs is taken over at once."""
        if self._training:
            self._take_over(state_dict)
        else:
            self._loaded = state_dict


@rank_zero_only
def _show_information() -> None:
    """Let the engine's information out as Lightning lets out its own, but for a level that the user has set."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(logging.StreamHandler())
        LOGGER.propagate = False


def _data_parallel_group(strategy: Any) -> Any:
    """The ranks between which the batch is split, where these are not all: others share a layer among them."""
    mesh = getattr(strategy, "_device_mesh", None)
    return mesh["data_parallel"].get_group() if mesh is not None else None


def _planned_steps(trainer: Any) -> float:
    """How many optimizer steps a fit has; infinity where that is not known."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # the number of accumulated batches changes with the epoch
        return math.inf
    return float(steps) if steps > 0 else math.inf


def _resumed_from(trainer: Any) -> str | None:
    """The checkpoint that a fit goes on from, or None.

    The learning-rate finder and the batch-size scaler leave the name of their own behind, to which they return.
    """
    path = trainer.ckpt_path
    if path is None or os.path.basename(str(path)).startswith((".lr_find_", ".scale_batch_size_")):
        return None
    return str(path)
