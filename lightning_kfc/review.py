"""The review of a step: what it was expected to do, what it did, and how it is shortened or taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc import distributed
from lightning_kfc.isolation import RandomStreams, eager_compiled_code, full_precision, leaving_no_trace
from lightning_kfc.layer import Layer
from lightning_kfc.layers.adapter import dense
from lightning_kfc.monitor import Events
from lightning_kfc.trust_region import FIXED_DAMPING, FIXED_RADIUS, MOST_PROMISED, Outcome, TrustRegion, Verdict

#: Gives the loss of a micro-batch again, scaled as the one whose gradient was taken.
Evaluation = Callable[[], Tensor | float]

#: What optimizers call the direction that they carry on from one step to the next.
MOMENTA = ("momentum_buffer", "exp_avg", "momentum")


@dataclass(frozen=True)
class PartLoss:
    """The loss of a part of a (micro-)batch, on the scale of the whole, and how it is had again.

    Attributes:
        value: At the weights of the step's forward.
        again: Gives it at the present weights, with the random numbers of that time.
    """

    value: Tensor
    again: Callable[[], Tensor | float]


@dataclass(frozen=True)
class Before:
    """What is kept of the time before a step.

    Attributes:
        parameters: The trained parameters.
        values: Their values.
        gradients: The gradients of the loss, by the parameter's identity, before they were preconditioned.
        loss: This rank's loss.
        size: The squared norm of the step in the Fisher metric, before clipping.
    """

    parameters: Sequence[nn.Parameter]
    values: Sequence[Tensor]
    gradients: Mapping[int, Tensor]
    loss: float
    size: float

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter], loss_scale: float, loss: float, size: float) -> Before:
        """Keep the present values and gradients of parameters that have a gradient."""
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = {id(p): dense(p.grad).clone() for p in trained if p.grad is not None}
        if loss_scale != 1:
            gradients = {key: gradient / loss_scale for key, gradient in gradients.items()}
        return cls(trained, [p.detach().clone() for p in trained], gradients, loss, size)

    def outcome(self, layers: Iterable[Layer], loss_before: float, loss_after: float) -> Outcome | None:
        """Compare now with then, given both losses, means over ranks; None where no parameter has changed."""
        deltas = {id(p): p.detach() - value for p, value in zip(self.parameters, self.values, strict=True)}
        if not any(bool(delta.any()) for delta in deltas.values()):
            return None
        slope = sum(_dot(self.gradients[key], delta) for key, delta in deltas.items())
        curvature = squared_length = 0.0
        for layer in layers:
            own = {role: deltas.get(id(p)) for role, p in layer.adapter.own_parameters().items()}
            known = {role: delta for role, delta in own.items() if delta is not None}
            if not known or tuple(known) != layer.roles:
                continue
            matrix = layer.matrix(known)
            curvature += 0.5 * layer.quadratic(matrix)
            # Damping is a part of the model only where it made the step: Adam's is not damped.
            squared_length += _dot(matrix, matrix) if layer.moments is None else 0.0
        return Outcome(loss_before, loss_after, slope, curvature, squared_length)

    def shorten(self, kept: float, optimizer: Optimizer | None) -> None:
        """Make the step, and the momentum that the optimizer carries on from it, a share of what they were.

        Args:
            kept: The share; 0 to take the step back, and to let go of the momentum, which led astray.
            optimizer: The one that made the step.
        """
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value if kept == 0 else torch.lerp(value, parameter, kept))
                state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
                for name in MOMENTA:
                    if isinstance(state.get(name), Tensor):
                        state[name].mul_(kept) if kept else state[name].zero_()


class Reviewer:
    """Follows the losses of each step, keeps what its review needs, and draws the consequences.

    Args:
        model: The model.
        region: The trust region; nothing is kept while nothing in it sets itself.
        events: Counts what goes other than planned.
        total: Adds up what each rank finds for the layers whose factors it holds; the same on all ranks where all do.
    """

    def __init__(
        self,
        model: nn.Module,
        region: TrustRegion,
        events: Events,
        total: Callable[[float], float] = lambda own: own,
    ) -> None:
        self._model = model
        self.region = region
        self._events = events
        self._total = total
        self._losses: list[Tensor] = []
        self._streams: list[RandomStreams] = []
        self._before: Before | None = None
        self.last: Verdict | None = None

    @property
    def due(self) -> bool:
        """Whether the step that was just made is to be reviewed."""
        return self._before is not None

    def fix(self) -> None:
        """Set nothing automatically from now on: what was "auto" gets its documented fixed value."""
        region = self.region
        region.radius = FIXED_RADIUS if region.adapts_radius else region.radius
        region.damping = FIXED_DAMPING if region.adapts_damping else region.damping
        region.adapts_radius = region.adapts_damping = False
        self.begin_step()

    @property
    def losses_seen(self) -> int:
        """The number of losses of this step."""
        return len(self._losses)

    def cancel(self) -> None:
        """Do without the review of this step."""
        self._before = None

    def begin_step(self) -> None:
        """Forget the last step."""
        self._losses, self._streams, self._before = [], [], None

    def forward_begins(self) -> None:
        """Keep the random streams, so that dropout falls as it falls now when the loss is evaluated again."""
        if self.region.active:
            self._streams.append(RandomStreams.of(self._model))

    def note_loss(self, loss: Tensor, loss_scale: float) -> None:
        """Keep the loss of one more micro-batch."""
        if self.region.active:
            self._losses.append(loss.detach() / loss_scale if loss_scale != 1 else loss.detach())

    def most_decrease(self, *, never_negative: bool) -> float | None:
        """What the slope of the coming step may promise; None for anything. Every rank must ask.

        Args:
            never_negative: Whether the loss is known to have no less than 0 in it.
        """
        if not self.region.adapts_radius or not self._losses:
            return None
        device = next(self._model.parameters()).device
        loss, unknown = distributed.mean([self._loss(), float(not never_negative)], device)
        return MOST_PROMISED * loss if not unknown and math.isfinite(loss) and loss > 0 else None

    def before_step(
        self, step: int, size: float, damping: float, parameters: Iterable[nn.Parameter], loss_scale: float
    ) -> None:
        """Keep what a review of the coming step needs, if one is due; the gradients are still the loss's.

        Args:
            step: The optimizer step.
            size: The squared norm of the step in the Fisher metric, before clipping; 0 where there is none.
            damping: In force at this step; where it does not set itself, what the step is held against.
            parameters: Those that the optimizer is about to step.
            loss_scale: What the gradients are multiplied by.
        """
        self._before = None
        if not self.region.active or not self._losses or size <= 0:
            return
        if self.region.review_due(step, size):
            if not self.region.adapts_damping:
                self.region.damping = damping
            self._before = Before.of(parameters, loss_scale, self._loss(), size)

    def review(
        self,
        evaluations: Sequence[Evaluation],
        layers: Iterable[Layer],
        optimizer: Optimizer | None,
        parts: Sequence[PartLoss] = (),
    ) -> Verdict | None:
        """Evaluate the step's batch again, adjust the region, and shorten the step where it went wrong.

        Args:
            evaluations: Give the losses of the step's micro-batches.
            layers: The layers.
            optimizer: The one that made the step.
            parts: Losses of parts of them, which are looked at instead; none to look at the whole.

        Returns:
            What followed; None where no review was due, or nothing has changed.
        """
        before, self._before = self._before, None
        if before is None:
            return None
        if len(evaluations) != len(self._losses):
            raise ValueError(
                f"review() evaluates every loss of the step again: it got {len(evaluations)} function(s) for "
                f"{len(self._losses)} loss(es) that update() has seen. Pass one function a micro-batch."
            )
        device = next(self._model.parameters()).device
        error: Exception | None = None
        loss_after = float("nan")
        try:
            loss_after = self._evaluate([part.again for part in parts] or evaluations)
        except Exception as raised:
            error = raised
        own = sum(float(part.value) for part in parts) if parts else before.loss
        # A rank that cannot evaluate says so, instead of leaving the others to wait for its loss.
        loss_before, loss_after, failed = distributed.mean([own, loss_after, float(error is not None)], device)
        if failed:
            raise error or RuntimeError("another rank could not evaluate its loss")
        with torch.no_grad(), full_precision(self._model):
            outcome = before.outcome(layers, loss_before, loss_after)
        if outcome is None:
            return None
        outcome = replace(outcome, curvature=self._total(outcome.curvature))
        self.last = self.region.judge(outcome, before.size)
        if self.last.kept < 1:
            before.shorten(self.last.kept, optimizer)
            self._events.count("undone_steps" if self.last.undo else "shortened_steps")
        return self.last

    def _loss(self) -> float:
        """This rank's loss of the step."""
        return sum(float(value) for value in self._losses)

    def _evaluate(self, evaluations: Sequence[Evaluation]) -> float:
        total = 0.0
        with torch.no_grad(), eager_compiled_code(), leaving_no_trace(self._model):
            for position, evaluation in enumerate(evaluations):
                if position < len(self._streams):
                    self._streams[position].restore()
                total += float(evaluation())
        return total


def _dot(a: Tensor, b: Tensor) -> float:
    # Summed in float64: a slope is a small sum of large terms near the minimum.
    return float(torch.sum(a * b, dtype=torch.float64))
