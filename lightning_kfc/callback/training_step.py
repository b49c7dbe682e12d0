"""Open the engine's capture around every training step, and detach it when fitting ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_kfc.callback.averaged_weights import AveragedWeights
from lightning_kfc.callback.notices import Notices
from lightning_kfc.kfc import KFC
from lightning_kfc.reporting.report import Report


class TrainingStepCapture:
    """Opens the engine's capture around each training step, and detects backwards and steps without hooks.

    It is inactive while the trainer runs without the callback, as under the learning-rate finder and the
    batch-size scaler.

    Args:
        trainer: The trainer.
        callback: The callback.
        kfc: The engine.
        report: Observes the training step, inside the engine's capture.
        notices: Takes the warnings.
    """

    def __init__(self, trainer: Any, callback: object, kfc: KFC, report: Report, notices: Notices) -> None:
        self._trainer = trainer
        self._callback = callback
        self._kfc = kfc
        self._report = report
        self._notices = notices
        #: Updated before and after each optimizer step; None for no average.
        self.average: AveragedWeights | None = None
        #: Whether training has started: the state of a sharded optimizer is loaded earlier, by a step of zero.
        self.training = False
        self._in_backward = False
        self._announced: set[int] = set()
        # The optimizers whose step() runs now, outermost first: Lookahead and SAM call the step of another one.
        self._stepping: list[Optimizer] = []
        self._undo = contextlib.ExitStack()
        self._undo.callback(_surround_training_steps(trainer.precision_plugin, self._around_training_step))
        # Hooks on all optimizers: a trainer's optimizers may be replaced during a fit, and may wrap others.
        for handle in (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            self._undo.callback(handle.remove)

    def detach(self) -> None:
        """Leave the trainer as it was."""
        self.training = False
        self._undo.close()

    def _active(self) -> bool:
        # The learning-rate finder removes the other callbacks while it runs.
        return self.training and any(callback is self._callback for callback in self._trainer.callbacks)

    def batch_begins(self) -> None:
        """Forget steps of the previous batch that an exception ended."""
        self._stepping.clear()
        self._announced.clear()

    def backward_begins(self) -> None:
        """Note that Lightning's backward begins."""
        self._in_backward = True

    def backward_ends(self) -> None:
        """Note that Lightning's backward has ended."""
        self._in_backward = False

    def step_begins(self, optimizer: Optimizer) -> None:
        """Note an optimizer step that Lightning's hooks have announced."""
        self._announced.add(id(optimizer))
        if self.average is not None:
            self.average.step_begins(optimizer)

    def warn_of_unseen_backward(self) -> None:
        """Warn about gradients from a backward that did not go through Lightning."""
        self._notices.warn(
            "KFCCallback does not see loss.backward(): its gradient gives no curvature and is not preconditioned. "
            "Call self.manual_backward(loss) instead. To set gradients of your own, as gradient surgery does, call it "
            "with the sum of the losses first, and set them then."
        )

    @contextlib.contextmanager
    def _around_training_step(self) -> Iterator[None]:
        if not self._active():
            yield
            return
        # A backward that raised did not reset this.
        self._in_backward = False
        if self._stepping and id(self._stepping[0]) in self._announced:
            self._kfc.reopen_step()
            self._notices.inform(
                f"KFCCallback: {type(self._stepping[0]).__name__} evaluates its closure several times in a step. Every "
                "gradient is preconditioned; curvature and reviews use the first evaluation."
            )
        with self._kfc.capture(), self._gradients_watched(), self._report.observing():
            yield

    @contextlib.contextmanager
    def _gradients_watched(self) -> Iterator[None]:
        """Detect gradients of a bare ``loss.backward()`` in a recorded training step."""
        kfc = self._kfc
        with contextlib.ExitStack() as handles:
            for name in kfc.layers if kfc.reviewer.recording else kfc.batches.recorded:
                parameter = next(iter(kfc.layers[name].adapter.own_parameters().values()), None)
                if parameter is not None and parameter.is_leaf:
                    seen = partial(self._after_gradient, name)
                    handle = parameter.register_post_accumulate_grad_hook(seen)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                    handles.callback(handle.remove)
            yield

    def _after_gradient(self, layer: str, parameter: Tensor) -> None:
        if not self._in_backward:
            self._kfc.batches.forget([layer])
            self._kfc.reviewer.forget_losses()
            self.warn_of_unseen_backward()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepping.append(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping:
            self._stepping.pop()
        # The step of a wrapped optimizer is a part of the wrapper's step.
        if self._stepping or not self._active():
            return
        if id(optimizer) in self._announced:
            self._announced.discard(id(optimizer))
            # Here, so that later readers of the weights see the reviewed ones.
            verdict = self._kfc.review(optimizer=optimizer)
            if verdict is not None and verdict.kept_share == 0:
                return
        elif self._kfc.layers.learning_rates(optimizer):
            self._notices.warn(
                f"KFCCallback could not precondition a step of {type(optimizer).__name__}: the step did not go through "
                "Lightning's wrapped optimizer. Call step() of what self.optimizers() returns, or "
                "super().optimizer_step(...). Avoid optimizers(use_pl_optimizer=False), optimizer.optimizer.step() and "
                "second_step() of optimizers such as SAM."
            )
            self._kfc.skip(optimizer)
        if self.average is not None:
            self.average.update(optimizer)


class _TrainStepContext:
    """Replaces a precision plugin's ``train_step_context``, which surrounds every training step.

    A pair of callback hooks would leave the contexts open when the step raises. Several callbacks share one object.
    """

    def __init__(self, original: Callable[[], contextlib.AbstractContextManager[None]], before: Any) -> None:
        self._original = original
        self.before = before
        self.within: list[Callable[[], contextlib.AbstractContextManager[None]]] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._original())
            for context in self.within:
                stack.enter_context(context())
            yield


def _surround_training_steps(
    plugin: Any, context: Callable[[], contextlib.AbstractContextManager[None]]
) -> Callable[[], None]:
    """Enter a context in every training step; return the function that undoes this."""
    before = plugin.__dict__.get("train_step_context")
    if isinstance(before, _TrainStepContext):
        shared = before
    else:
        shared = _TrainStepContext(plugin.train_step_context, before)
        plugin.train_step_context = shared
    shared.within.append(context)

    def undo() -> None:
        shared.within.remove(context)
        # If other code has wrapped ours since, ours stays there with no contexts.
        if shared.within or plugin.__dict__.get("train_step_context") is not shared:
            return
        if shared.before is None:
            del plugin.train_step_context
        else:
            plugin.train_step_context = shared.before

    return undo
