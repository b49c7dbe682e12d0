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
    """Opens the engine's capture around each training step, and sees what goes past the callback's hooks.

    Nothing of it acts while the trainer runs without the callback, as the learning-rate finder and the
    batch-size scaler have it do.

    Args:
        trainer: The trainer.
        callback: Nothing acts while this is not among the trainer's callbacks.
        kfc: The engine.
        report: Observes the training step, inside the engine's own capture.
        notices: Takes the warnings.
    """

    def __init__(self, trainer: Any, callback: object, kfc: KFC, report: Report, notices: Notices) -> None:
        self._trainer = trainer
        self._callback = callback
        self._kfc = kfc
        self._report = report
        self._notices = notices
        #: Mixes in the weights that a step has left.
        self.average: AveragedWeights | None = None
        #: Whether training has started: a sharded optimizer's state is loaded before, by a step that moves nothing.
        self.training = False
        self._in_backward = False
        self._announced: set[int] = set()
        # The optimizers whose step() runs now, the outermost first: Lookahead and SAM call another one's.
        self._stepping: list[Optimizer] = []
        self._undo = contextlib.ExitStack()
        self._undo.callback(_surround_training_steps(trainer.precision_plugin, self._around_training_step))
        # Hooks on all optimizers: those of a trainer may be replaced during a fit, and wrap others.
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
        # The learning-rate finder, for one, takes the other callbacks out while it runs.
        return self.training and any(callback is self._callback for callback in self._trainer.callbacks)

    def batch_begins(self) -> None:
        """Forget steps of the previous batch that raised and did not end."""
        self._stepping.clear()
        self._announced.clear()

    def backward_begins(self) -> None:
        """Note that Lightning's backward begins: gradients that arrive now come from it."""
        self._in_backward = True

    def backward_ends(self) -> None:
        """Note that Lightning's backward has ended."""
        self._in_backward = False

    def step_begins(self, optimizer: Optimizer) -> None:
        """Note an optimizer step that Lightning's hooks have announced."""
        self._announced.add(id(optimizer))

    def warn_of_unseen_backward(self) -> None:
        """Warn of gradients that have arrived outside of Lightning's own backward."""
        self._notices.warn(
            "KFCCallback takes no curvature from, and does not precondition, the gradient of a backward that does not "
            "go through Lightning. Call self.manual_backward(loss) instead of loss.backward()."
        )

    @contextlib.contextmanager
    def _around_training_step(self) -> Iterator[None]:
        if not self._active():
            yield
            return
        # A backward that raised has not ended.
        self._in_backward = False
        if self._stepping and id(self._stepping[0]) in self._announced:
            self._kfc.reopen_step()
            self._notices.inform(
                f"KFCCallback: {type(self._stepping[0]).__name__} evaluates its closure several times in a step. The "
                "gradient of each is preconditioned; curvature and reviews are taken from the first."
            )
        with self._kfc.capture(), self._gradients_watched(), self._report.observing():
            yield

    @contextlib.contextmanager
    def _gradients_watched(self) -> Iterator[None]:
        """See the gradients that a bare ``loss.backward()`` in a recorded training step brings."""
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
        # The step of a wrapped optimizer is a part of the wrapper's.
        if self._stepping or not self._active():
            return
        if id(optimizer) in self._announced:
            self._announced.discard(id(optimizer))
            # At once: what else looks at the new weights sees those that are kept.
            verdict = self._kfc.review(optimizer=optimizer)
            if verdict is not None and verdict.kept_share == 0:
                return
        elif self._kfc.layers.learning_rates(optimizer):
            self._notices.warn(
                f"KFCCallback could not precondition a step of {type(optimizer).__name__}: it was made around "
                "Lightning's wrapped optimizer (by optimizers(use_pl_optimizer=False), optimizer.optimizer.step(), the "
                "second_step() of an optimizer such as SAM, or an overridden optimizer_step that steps on its own). "
                "Call step() of what self.optimizers() returns, or super().optimizer_step(...)."
            )
            self._kfc.skip(optimizer)
        if self.average is not None:
            self.average.update(optimizer)


class _TrainStepContext:
    """Stands in for a precision plugin's ``train_step_context``, which surrounds every training step.

    Also those of closures and of manual optimization; opening something in one callback hook and closing it in
    another would leak when the step raises. Several callbacks share one.
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
    """Enter a context in every training step; what is returned undoes it."""
    before = plugin.__dict__.get("train_step_context")
    if isinstance(before, _TrainStepContext):
        shared = before
    else:
        shared = _TrainStepContext(plugin.train_step_context, before)
        plugin.train_step_context = shared
    shared.within.append(context)

    def undo() -> None:
        shared.within.remove(context)
        # Where something else has wrapped ours since, ours stays in it and does nothing.
        if shared.within or plugin.__dict__.get("train_step_context") is not shared:
            return
        if shared.before is None:
            del plugin.train_step_context
        else:
            plugin.train_step_context = shared.before

    return undo
