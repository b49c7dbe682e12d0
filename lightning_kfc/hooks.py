"""The callback's hooks, written once for the packages ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.kfc import KFC
from lightning_kfc.likelihood import Bernoulli, Categorical, Gaussian
from lightning_kfc.schedule import ExponentialSchedule, LinearSchedule
from lightning_kfc.settings import Settings

#: Strategies that own the backward or the parameters in a way that leaves no room for us, with the way out.
REFUSED_STRATEGIES = {
    "FSDPStrategy": "use ModelParallelStrategy (FSDP2) instead",
    "DeepSpeedStrategy": "use DDPStrategy, or ModelParallelStrategy for sharding",
    "XLAFSDPStrategy": "use an XLA strategy without sharding",
}


class KFCHooks:
    r"""Preconditions gradients with KFC (Grosse & Martens 2016), whatever the module and its optimizer.

    Add it to ``Trainer(callbacks=[KFCCallback()])``. The optimizer stays the module's own; SGD with momentum is
    the paper's, and ``SGD(lr=0.5, momentum=0.5)`` is a good start.

    Args:
        damping: Added to the curvature before it is inverted: larger is closer to plain SGD, smaller closer
            to the full natural gradient. A number, or a schedule over optimizer steps.
        fisher: Whose targets the curvature is taken with. "mc": sampled from the model; "exact": all
            possible ones, at one back-propagation each; "empirical": the data's.
        likelihood: What the loss is the negative logarithm of. "auto" recognises it by the loss functions
            called in `training_step`. A likelihood object with `output_of` names the module whose output is
            the logits, for losses that are computed otherwise.
        factor_every_n_steps: Curvature statistics are taken every so many optimizer steps.
        inverse_every_n_steps: Inverses are refreshed every so many optimizer steps.
        warmup_steps: During the first so many optimizer steps, statistics are taken at every step.
        ema_decay: Decay of the running averages of the statistics, at least 0 and below 1.
        kl_clip: Bound on the size of a step, measured in how much it changes the model's predictions; null for none.
        inverse: How the damped curvature is inverted. "cholesky": damping split over both factors, the cheapest;
            "eigh": damping applied exactly; "ekfac": also with the second moments of single examples' gradients.
        rule: How gradients and inverses make an update. "natural": the paper's.
        weight_sharing: "expand": each use of a weight counts by itself; "reduce": the uses by an example count as one.
        max_factor_dim: A layer's factor with more dimensions than this is kept as its diagonal; null for no bound.
        include: Glob patterns over module names, such as "encoder.*": only these modules are preconditioned.
        exclude: Glob patterns over module names that are not preconditioned.
        seed: Seed of the sampled targets. The global random stream is never touched.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        damping: float | ExponentialSchedule | LinearSchedule = 0.01,
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"]
        | Categorical
        | Bernoulli
        | Gaussian = "auto",
        factor_every_n_steps: int = 10,
        inverse_every_n_steps: int = 20,
        warmup_steps: int = 10,
        ema_decay: float = 0.95,
        kl_clip: float | None = 0.03,
        inverse: Literal["cholesky", "eigh", "ekfac"] = "cholesky",
        rule: Literal["natural"] = "natural",
        weight_sharing: Literal["expand", "reduce"] = "expand",
        max_factor_dim: int | None = 10_000,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._settings = Settings(
            damping=damping,
            fisher=fisher,
            likelihood=likelihood,
            factor_every_n_steps=factor_every_n_steps,
            inverse_every_n_steps=inverse_every_n_steps,
            warmup_steps=warmup_steps,
            ema_decay=ema_decay,
            kl_clip=kl_clip,
            inverse=inverse,
            rule=rule,
            weight_sharing=weight_sharing,
            max_factor_dim=max_factor_dim,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        self._kfc: KFC | None = None
        self._module: Any = None
        self._loaded: dict[str, Any] | None = None
        self._detach: Callable[[], None] | None = None
        self._backwards = 0
        self._preconditioned_at: dict[int, int] = {}

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
        self._kfc = KFC.from_settings(pl_module, self._settings)
        self._module = pl_module
        if previous is not None:
            self._kfc.load_state_dict(previous)
        self._preconditioned_at.clear()
        self._attach(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the checkpoint's state (under FSDP2 it is loaded after on_fit_start), and report."""
        if self._loaded is not None:
            for problem in self.kfc.load_state_dict(self._loaded):
                rank_zero_warn(f"KFCCallback: {problem}.")
            self._loaded = None
        elif trainer.ckpt_path is not None:
            self._kfc = KFC.from_settings(pl_module, self._settings)
            rank_zero_info("KFCCallback: the checkpoint holds no state of this callback; curvature is estimated anew.")
        rank_zero_info(f"KFC preconditions these layers:\n{self.kfc.coverage()}")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach: after an exception there is no teardown."""
        self._end()

    def _attach(self, trainer: Any) -> None:
        """Open the capture around each training step.

        The plugin's context is what surrounds every training step, also those of closures and of manual
        optimization; opening it in one hook and closing it in another would leak when the step raises.
        """
        self._end()
        plugin = trainer.precision_plugin
        original = plugin.train_step_context

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with original(), self.kfc.capture():
                yield

        plugin.train_step_context = context
        self._detach = lambda: plugin.__dict__.pop("train_step_context", None)

    def _end(self) -> None:
        if self._detach is not None:
            self._detach()
            self._detach = None

    # A training step.

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Take the statistics of this loss, while its graph lives."""
        fraction = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        self.kfc.back_propagate(loss, loss_scale=self._loss_scale(trainer), loss_fraction=fraction)
        self.kfc.pause()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Fold a complete step's statistics into the factors and refresh inverses, the graph's memory being free."""
        self._backwards += 1
        self.kfc.resume()
        # In manual optimization the step of each optimizer says when its own layers' statistics are complete.
        if pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
            self.kfc.refresh()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Replace the gradients of this optimizer's parameters."""
        if self._preconditioned_at.get(id(optimizer), 0) == self._backwards:
            # SWA's extra epoch, for one, comes here without a backward: these gradients are not fresh.
            if not pl_module.automatic_optimization:
                self._warn_bare_backward()
            return
        self._preconditioned_at[id(optimizer)] = self._backwards
        self.kfc.precondition(optimizer=optimizer)
        self._log(trainer)

    def _warn_bare_backward(self) -> None:
        warnings.warn(
            "KFCCallback leaves the gradients of this optimizer step as they are: no backward went through "
            "self.manual_backward(loss) since the last one. Call it instead of loss.backward().",
            stacklevel=2,
        )

    def _loss_scale(self, trainer: Any) -> float:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _log(self, trainer: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        numbers = self.kfc.last_step
        if numbers is None or not trainer.loggers or loop._batches_that_stepped % trainer.log_every_n_steps != 0:
            return
        for logger in trainer.loggers:
            logger.log_metrics(numbers.as_metrics(), step=loop._batches_that_stepped)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The preconditioner's state in plain tensors, numbers, strings, dicts and lists."""
        if self._loaded is not None:
            return self._loaded
        return self._kfc.state_dict() if self._kfc is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts."""
        self._loaded = state_dict
