"""Record the forward of a batch, and take the statistics of its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from lightning_kfc.engine.stages import Stages
from lightning_kfc.estimation.loss_statistics import StepStatistics
from lightning_kfc.utilities.isolation import eager_compiled_code


class Batches:
    """Records the batches of each step: their layers for the curvature, their losses for the review.

    A step that accumulates gradients has several batches, and a batch may have several losses.

    Args:
        stages: The stages.

    Attributes:
        losses: The number of losses of this step whose statistics were taken.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._estimator, self._pending, self._reviewer = stages.estimator, stages.pending, stages.reviewer
        self._backward = contextlib.ExitStack()
        self.losses = 0

    @property
    def recorded(self) -> tuple[str, ...]:
        """The layers whose statistics are taken at this step."""
        return tuple(self._estimator.recorded)

    @property
    def sources(self) -> str:
        """The source of the last statistics, such as loss functions, or the gradient of the loss itself."""
        return ", ".join(self._estimator.sources) or "nothing so far"

    def step_begins(self) -> None:
        """Reset the count of losses, and drop the last step's review if it was not made."""
        self.losses = 0
        self._reviewer.step_begins()

    def require_capture(self) -> None:
        """Require a recorded forward, if the step is due.

        Raises:
            RuntimeError: If the step is due and no forward was recorded.
        """
        stages, step = self._stages, self._stages.steps.number
        if stages.layers and not self._estimator.active and stages.tracker.statistics_due(step):
            raise RuntimeError(
                f"KFC has recorded nothing at step {step}: compute the loss inside `with kfc.capture():`."
            )

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record the forward and the loss of one batch, if they are due."""
        steps = self._stages.steps
        if steps.again:
            self._estimator.record_nothing()
            self._reviewer.release()
            yield
            return
        with self._reviewer.record(steps.number), self._estimator.capture():
            try:
                yield
            finally:
                self.resume()

    def back_propagate(self, loss: Tensor, *, loss_scale: float, loss_fraction: float) -> None:
        """Back-propagate the seeds of a loss to the layers, while its graph lives.

        Args:
            loss: The scalar whose backward follows.
            loss_scale: The factor that a gradient scaler has multiplied ``loss`` by.
            loss_fraction: The share of ``loss`` in the optimizer step, for terms without a known weight.
        """
        self._reviewer.note_loss(loss, loss_scale, statistics=self._estimator.active)
        if not self._estimator.active:
            return
        # In manual optimization the forward is still being recorded.
        self.pause()
        steps, expected = self._stages.steps, set(self.recorded)
        try:
            before = set(self._stages.layers)
            self._give_up(self._estimator.differentiated(loss))
            self._estimator.record_replacements(before)
            # Other layers replace dropped ones.
            expected.update(self.recorded)
            found = self._estimator.statistics(
                loss,
                self.losses,
                loss_scale=loss_scale,
                loss_fraction=loss_fraction,
                unseen=self._pending.unseen,
            )
        except Exception as error:
            if not steps.any_made:
                raise
            found = StepStatistics(failed=dict.fromkeys(expected, error))
        finally:
            self.resume()
        self._give_up(found.unexplained)
        self._pending.leave_out(found.failed, steps.number)
        self._stages.factors.expect(expected)
        # Not checked here: whether statistics are finite is decided from the sum over ranks.
        self._pending.add(found.by_layer)
        self.losses += 1

    def _give_up(self, reasons: Mapping[str, str]) -> None:
        if self._stages.group.size == 1:
            self._stages.layers.drop_all(reasons)
        else:
            # The next refresh of factors drops these layers on all ranks.
            self._stages.factors.give_up_together(reasons)

    def pause(self) -> None:
        """Record nothing until :meth:`resume`, since a backward re-runs checkpointed forwards."""
        if self._estimator.active or self._reviewer.recording:
            # Activation checkpointing must run the same code, eagerly, in the backward.
            self._backward.enter_context(eager_compiled_code())
        self._estimator.pause()
        self._reviewer.pause()

    def resume(self) -> None:
        """Record again, if the capture is still open. Call it also after a backward that raised."""
        self._estimator.resume()
        self._backward.close()
        self._reviewer.resume()

    def release(self) -> None:
        """Release the last recorded forward and its graph."""
        self._estimator.release()
        self._reviewer.release()
        self._stages.factors.abandon()

    def forget(self, layers: Iterable[str]) -> None:
        """Take no statistics of layers until their next step, since a part of their gradient is unrecorded."""
        self._pending.forget(layers)

    def skip(self, layers: Collection[str]) -> None:
        """Drop the statistics of layers that made no step."""
        self._pending.skip(layers)
        self._stages.factors.discard(layers)
        self._reviewer.cancel()

    def abandon(self, layers: Collection[str]) -> None:
        """Drop the statistics and losses of a step that is not made.

        Its gradients are not finite, or a state, which is one between two steps, is loaded in its middle.
        """
        self._pending.skip(layers)
        self._stages.factors.discard(layers)
        self._reviewer.forget_losses()
        self._reviewer.resume()
        # As after a resume, whose sampled targets depend on this count.
        self.losses = 0

    def follow_gradients(self) -> None:
        """Drop the statistics of gradients that were zeroed; call it just before each backward.

        A generator's loss, for example, leaves a gradient in the discriminator that is zeroed before it is used.
        """
        self._pending.follow_gradients()
