"""What is attached to a trainer while it fits, and how it comes off again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.kfc import KFC


class Attachment:
    """Opens the engine's capture around each training step, and sees what goes past the callback's hooks.

    Nothing of it acts while the trainer runs without the callback, as the learning-rate finder and the
    batch-size scaler have it do.

    Args:
        trainer: The trainer.
        active: Whether the callback takes part now.
        kfc: Gives the engine; a checkpoint may have replaced it since.
        capture: Opens its capture of the present batch.
        on_unseen_backward: Called when a gradient arrives outside of Lightning's own backward.
        on_step: Called with an optimizer that has stepped as Lightning had announced, before anything else sees the
            new weights.
        on_unseen_step: Called with an optimizer that has stepped without Lightning's hooks.
        observing: A context around each training step, inside the engine's own.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        active: Callable[[], bool],
        kfc: Callable[[], KFC],
        capture: Callable[[], contextlib.AbstractContextManager[None]],
        on_unseen_backward: Callable[[], None],
        on_step: Callable[[Optimizer], None],
        on_unseen_step: Callable[[Optimizer], None],
        observing: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._active = active
        self._kfc = kfc
        self._capture = capture
        self._on_unseen_backward = on_unseen_backward
        self._on_step = on_step
        self._on_unseen_step = on_unseen_step
        self._observing = observing
        self._in_backward = False
        self._announced: set[int] = set()
        self._undo = contextlib.ExitStack()
        self._undo.callback(_surround_training_steps(trainer.precision_plugin, self._around_training_step))
        self._trainer = trainer
        # By reference: an optimizer that has gone must not hide a later one of the same address.
        self._followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._follow_optimizers()

    def detach(self) -> None:
        """Leave the trainer as it was."""
        self._undo.close()

    def _follow_optimizers(self) -> None:
        """See the steps of all optimizers that the trainer has now: a module may replace them."""
        for optimizer in self._trainer.optimizers:
            if isinstance(optimizer, Optimizer) and optimizer not in self._followed:
                self._followed.add(optimizer)
                handle = optimizer.register_step_post_hook(self._after_step)
                self._undo.callback(handle.remove)

    def backward_begins(self) -> None:
        """Lightning's backward begins: the gradients that arrive now are known."""
        self._in_backward = True

    def backward_ends(self) -> None:
        """Lightning's backward has ended."""
        self._in_backward = False

    def step_begins(self, optimizer: Optimizer) -> None:
        """Lightning's hooks have announced an optimizer step."""
        self._announced.add(id(optimizer))

    @contextlib.contextmanager
    def _around_training_step(self) -> Iterator[None]:
        if not self._active():
            yield
            return
        # A backward that raised has not ended.
        self._in_backward = False
        self._follow_optimizers()
        with self._capture(), self._gradients_watched(), self._observing():
            yield

    @contextlib.contextmanager
    def _gradients_watched(self) -> Iterator[None]:
        """See the gradients that a bare ``loss.backward()`` in a due training step brings."""
        with contextlib.ExitStack() as handles:
            for name in self._kfc().recorded:
                parameter = next(iter(self._kfc().layers[name].adapter.own_parameters().values()), None)
                if parameter is not None and parameter.is_leaf:
                    seen = partial(self._after_gradient, name)
                    handle = parameter.register_post_accumulate_grad_hook(seen)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                    handles.callback(handle.remove)
            yield

    def _after_gradient(self, layer: str, parameter: Tensor) -> None:
        if not self._in_backward:
            self._kfc().forget([layer])
            self._on_unseen_backward()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._announced:
            self._announced.discard(id(optimizer))
            if self._active():
                self._on_step(optimizer)
        elif self._active():
            self._on_unseen_step(optimizer)


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
