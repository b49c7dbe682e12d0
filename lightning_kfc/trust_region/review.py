"""Review steps: compare actual and expected decrease, and shorten bad steps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.optimizer_step import OptimizerStep, directions
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.losses.traits import LossTraits
from lightning_kfc.monitoring.events import Events
from lightning_kfc.settings import Settings
from lightning_kfc.trust_region.losses_seen import LossesSeen, SeenLoss
from lightning_kfc.trust_region.outcome import Verdict
from lightning_kfc.trust_region.region import MOST_RAISED, UNREVIEWED_RADIUS, TrustRegion
from lightning_kfc.trust_region.regions import TrustRegions
from lightning_kfc.trust_region.replay_checks import replay_error, replayability, replayed_step
from lightning_kfc.trust_region.snapshot import StepSnapshot
from lightning_kfc.trust_region.tape import Tape
from lightning_kfc.utilities.isolation import eager_compiled_code, full_precision

#: Missed reviews in a row that end all reviews.
MISSES_ALLOWED = 5


class StepReviewer:
    """Holds the losses and trust regions of the optimizers, and adjusts their radii by reviews of steps.

    Args:
        model: The model.
        settings: The settings.
        events: Counts missed, shortened and undone steps.
        ownership: The ranks that hold each layer's factors.

    Attributes:
        losses: The losses of the coming steps.
        regions: The trust region of each optimizer, whose radius the reviews adapt.
        last: The last verdict.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        events: Events,
        ownership: LayerOwnership,
    ) -> None:
        self._model = model
        self._events = events
        self._ownership = ownership
        self._tape: Tape | None = None
        self.losses = LossesSeen(model)
        self.regions = TrustRegions(settings, self.losses, events)
        self._snapshot: StepSnapshot | None = None
        # Whether the first review of the fit has checked that a replay reproduces the loss.
        self._checked = False
        self._misses = 0
        self.last: Verdict | None = None

    @property
    def region(self) -> TrustRegion:
        """The trust region of the present step's optimizer."""
        return self.regions.present

    @property
    def active(self) -> bool:
        """Whether steps are reviewed."""
        return self.regions.reviewing

    @property
    def recording(self) -> bool:
        """Whether the present forward is recorded, or was recorded last."""
        return self._tape is not None

    # Before a step.

    def step_begins(self) -> None:
        """Begin a new step. If the last step missed its review, reviews end with a warning."""
        if self._snapshot is not None:
            self._end_with_warning("kfc.review(optimizer=optimizer) was not called after optimizer.step()")
        self.cancel()

    @contextlib.contextmanager
    def record(self, step: int) -> Iterator[None]:
        """Record the forward inside this context, if the step is due for review."""
        self._tape = None
        planned = self.regions.review_planned(step) and self._snapshot is None
        # The first forward of a lazy module makes its parameters, and cannot be replayed.
        if not planned or any(map(is_lazy, self._model.parameters())):
            yield
            return
        self._tape = tape = Tape()
        try:
            with eager_compiled_code(), tape:
                yield
        except BaseException:
            self._tape = None
            raise
        finally:
            tape.finish()

    def pause(self) -> None:
        """Record nothing until :meth:`resume`, since backwards and optimizer steps are no parts of a loss."""
        if self._tape is not None:
            self._tape.paused = True

    def resume(self) -> None:
        """Record again, if a recording is still open."""
        if self._tape is not None:
            self._tape.paused = False

    def note_loss(self, loss: Tensor, loss_scale: float, *, statistics: bool) -> None:
        """Note a loss whose backward follows, if its magnitude is needed.

        Args:
            loss: The loss, multiplied by ``loss_scale``.
            loss_scale: The factor of a gradient scaler.
            statistics: Whether statistics of this loss are taken, whose unit may be a magnitude of the loss.
        """
        needed = statistics or self.regions.scheduled_damping is None or self.region.automatic_radius
        # An optimizer that calls its closure again has already moved the weights.
        if needed and self._snapshot is None:
            self.losses.note(loss, loss_scale, self._tape.locate(loss) if self._tape is not None else None)

    def forget_losses(self) -> None:
        """Drop the noted losses and the snapshot."""
        self.losses.forget()
        self._snapshot = None

    def cancel(self) -> None:
        """Drop the review of this step."""
        self._snapshot = None

    def release(self) -> None:
        """Drop the last recording; the losses of a coming step keep their own recordings."""
        self._tape = None

    def stepped(self, parameters: Iterable[Tensor], optimizer: Optimizer | None) -> None:
        """Note that an optimizer has stepped, and drop its losses.

        Args:
            parameters: The parameters that were stepped.
            optimizer: The optimizer; None if it is unknown.
        """
        self.losses.stepped(parameters, optimizer)

    def measure_units(self, layers: Sequence[Layer], traits: LossTraits) -> None:
        """Take the loss of the coming step, and the layers' weights, as units. Collective: call on every rank.

        Args:
            layers: The layers that the coming step moves.
            traits: What is known of the loss.
        """
        parameters = [parameter for layer in layers for parameter in layer.trained_parameters().values()]
        loss = self.losses.of_step(parameters, self._device, traits)
        if loss is not None:
            self.region.note_loss(loss.magnitude, never_negative=loss.never_negative)
        for layer in layers:
            if loss is not None:
                layer.note_loss(loss.magnitude, never_negative=loss.never_negative)
            if self.regions.scheduled_damping is None:
                layer.measure_weights()

    def note_step_loss(self, coming: OptimizerStep, traits: LossTraits, *, first: bool) -> float | None:
        """Note the loss of the coming step. Collective: call on every rank.

        Args:
            coming: The coming step.
            traits: What is known of the loss.
            first: Whether this is the first gradient of the step.

        Returns:
            The largest slope of the step; None for no bound.
        """
        if not self.region.adapts_radius:
            return None
        signs = directions(coming.optimizer)
        loss = self.losses.of_step(coming.parameters, self._device, traits)
        if loss is None:
            return None
        if first:
            self.region.note_step_loss(-loss.value if signs == {1} else loss.value)
        return self.region.most_decrease(loss.value) if loss.never_negative and signs == {-1} else None

    def before_step(self, step: int, size: float, damping: float, coming: OptimizerStep) -> None:
        """Take a snapshot for the review of the coming step, if one is due. Collective: call on every rank.

        Args:
            step: The number of the step.
            size: The squared norm of the step in the Fisher metric, before clipping; 0 without an update.
            damping: The damping in force at this step.
            coming: The coming step.
        """
        if not self.region.adapts_radius or size <= 0 or self._snapshot is not None:
            return
        planned = self.region.review_planned(step)
        self.region.stepped_at = step
        self.region.note_size(size)
        if not planned:
            return
        if len(directions(coming.optimizer)) > 1:
            self._end_with_warning("the optimizer has maximize=True in some parameter groups alone")
            return
        losses = self.losses.of(coming.parameters)
        found = replayability(self._tape, losses, self._device)
        losses = [seen for seen in losses if seen.recorded is not None]
        if found.refused:
            self._end_with_warning(found.refused)
        elif found.missed:
            self._miss(found.missed)
        # Without a recorded loss all are 0, which no step can lower.
        elif found.any_recorded and (
            self._checked or self._reproduces(losses, {}, with_collectives=found.with_collectives)
        ):
            self._checked = True
            self._snapshot = StepSnapshot.of(coming, losses, size, damping, found.with_collectives)

    def _reproduces(self, losses: Sequence[SeenLoss], values: Mapping[int, Tensor], *, with_collectives: bool) -> bool:
        """Whether a replay with unmoved weights reproduces the losses; if not, reviews end. Collective."""
        reason = replay_error(losses, values, self._device, with_collectives=with_collectives)
        if reason:
            self._end_with_warning(reason)
        return not reason

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    # The review.

    def review(self, layers: Iterable[Layer], optimizer: Optimizer | None) -> Verdict | None:
        """Replay the losses, adjust the step's region, and shorten a bad step. Collective.

        Args:
            layers: The layers.
            optimizer: The optimizer that has stepped; None if it is unknown.

        Returns:
            The verdict; None if no review was due, or no parameter has changed.
        """
        before = self._snapshot
        if before is None or (before.optimizer is not None and before.optimizer is not optimizer):
            return None
        before, self._snapshot = replace(before, optimizer=optimizer), None
        loss_before, loss_after, error = replayed_step(before, self._device)
        if error:
            self._miss(error)
            return None
        with torch.no_grad(), full_precision(self._model):
            outcome = before.outcome(layers, before.damping, loss_before, loss_after)
        if outcome is None:
            return None
        self._misses = 0
        outcome = replace(outcome, curvature=self._ownership.sum(outcome.curvature))
        region = self.regions.select(before.parameters)
        verdict = region.judge(outcome, before.size)
        if verdict.kept_share < 1 and not before.can_shorten:
            verdict = replace(verdict, undo=False, kept_share=1.0)
        if verdict.kept_share < 1:
            # A wrong replay must not undo a step.
            if not self._reproduces(before.losses, before.values_by_id, with_collectives=before.with_collectives):
                return None
            before.shorten(verdict.kept_share)
            self.regions.last_updates.forget()
            self._events.count("undone_steps" if verdict.undo else "shortened_steps")
        self.last = verdict
        if region.raised >= MOST_RAISED:
            self._end_with_warning(
                f"the last {MOST_RAISED} reviewed steps have raised the loss of their own batch, although the bound "
                "was lowered after each, as if their gradient were not that of the loss (gradient reversal), or the "
                "optimizer lengthened them",
                region,
            )
        return verdict

    # The end of reviews.

    def _miss(self, reason: str) -> None:
        self._events.count("missed_reviews")
        self._misses += 1
        if self._misses >= MISSES_ALLOWED:
            self._end_with_warning(reason)

    def _end_with_warning(self, reason: str, region: TrustRegion | None = None) -> None:
        message = self.end(reason, region=region)
        if message and distributed.rank() == 0:
            warnings.warn(message, stacklevel=2)

    def end(self, reason: str, *, fixed: bool = False, region: TrustRegion | None = None) -> str:
        """End all reviews, for a given reason.

        Args:
            reason: The reason.
            fixed: Whether to fix the bound. If not, it follows the slope of each step on the next batch.
            region: The region of the only optimizer whose reviews end; None for all.

        Returns:
            A message for the user; empty if no steps were reviewed.
        """
        if not (region or self.regions).end_reviews(fixed=fixed):
            return ""
        if not self.active:
            self.forget_losses()
        consequence = f"is fixed at {UNREVIEWED_RADIUS:g} times the loss"
        if not fixed:
            consequence = "follows the slope of each step on the next batch alone"
        return (
            f"kl_clip='auto' cannot review steps: {reason}. From now on it {consequence}. "
            "Set kl_clip to silence this message."
        )
