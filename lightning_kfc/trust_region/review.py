"""The review of a step: what it was expected to do, what it did, and how it is shortened or taken back."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.layers.adapter import dense
from lightning_kfc.monitoring.events import Events
from lightning_kfc.trust_region.region import FIXED_DAMPING, FIXED_RADIUS, MOST_PROMISED, Outcome, TrustRegion, Verdict
from lightning_kfc.trust_region.tape import RecordedLoss, Tape
from lightning_kfc.utilities.isolation import eager_compiled_code, full_precision

#: What optimizers call the direction that they carry on from one step to the next.
MOMENTA = ("momentum_buffer", "exp_avg", "momentum")

#: By how much a replay with unmoved weights may differ from the loss, as a share of it.
REPLAY_TOLERANCE = 1e-4

#: After so many steps in turn that were to be reviewed and could not be, reviews end.
MISSES_ALLOWED = 5


@dataclass
class SeenLoss:
    """A loss whose gradient is in the parameters.

    Attributes:
        value: The loss, without the factor of a gradient scaler.
        recorded: How it is evaluated again; None where its forward was not recorded.
        parameters: The parameters whose gradient may hold that of the loss, by ``id``.
    """

    value: Tensor
    recorded: RecordedLoss | None
    parameters: dict[int, Tensor]


@dataclass(frozen=True)
class Before:
    """What is kept of the time before a step.

    Attributes:
        optimizer: The optimizer that makes the step; None where it is not known.
        parameters: The trained parameters.
        values: Their values.
        gradients: The gradients of the loss, by the parameter's identity, before they were preconditioned.
        losses: The losses of the step, one a micro-batch.
        size: The squared norm of the step in the Fisher metric, before clipping.
        with_collectives: Whether the losses of some rank depend on what other ranks send.
    """

    optimizer: Optimizer | None
    parameters: Sequence[nn.Parameter]
    values: Sequence[Tensor]
    gradients: Mapping[int, Tensor]
    losses: Sequence[SeenLoss]
    size: float
    with_collectives: bool

    @classmethod
    def of(
        cls,
        optimizer: Optimizer | None,
        parameters: Iterable[nn.Parameter],
        losses: Sequence[SeenLoss],
        loss_scale: float,
        loss_gradients: Mapping[int, Tensor],
        size: float,
        with_collectives: bool,
    ) -> Before:
        """Keep the present values and gradients of parameters that have a gradient."""
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = {id(p): dense(loss_gradients.get(id(p), p.grad)).clone() for p in trained if p.grad is not None}
        if loss_scale != 1:
            gradients = {key: gradient / loss_scale for key, gradient in gradients.items()}
        values = [p.detach().clone() for p in trained]
        return cls(optimizer, trained, values, gradients, losses, size, with_collectives)

    @property
    def loss(self) -> float:
        """This rank's loss of the step."""
        return sum(float(loss.value) for loss in self.losses)

    def replay(self) -> float:
        """This rank's loss again, with the parameters as they are now."""
        now = {id(p): p.detach() for p in self.parameters}
        return _replayed(self.losses, now, with_collectives=self.with_collectives)

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

    @property
    def can_shorten(self) -> bool:
        """Whether all that the optimizer carries on is known, so that its step can be shortened with the weights.

        Lookahead or schedule-free optimizers hold other weights beside the model's: these alone must not be moved.
        """
        return self.optimizer is None or type(self.optimizer).__module__.startswith("torch.optim")

    def shorten(self, kept: float) -> None:
        """Make the step, and the momentum that the optimizer carries on from it, a share of what they were.

        Args:
            kept: The share; 0 to take the step back, and to let go of the momentum, which led astray.
        """
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value if kept == 0 else torch.lerp(value, parameter, kept))
                state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
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

    Attributes:
        region: The trust region.
        last: The last verdict.
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
        self._tape: Tape | None = None
        self._losses: list[SeenLoss] = []
        # By the id of each optimizer that has stepped: the ids of its parameters.
        self._optimizers: dict[int, set[int]] = {}
        self._before: Before | None = None
        # Whether a replay has given a loss again, which the first review of a fit finds out.
        self._checked = False
        self._misses = 0
        self.last: Verdict | None = None

    @property
    def due(self) -> bool:
        """Whether the step that was just made is to be reviewed."""
        return self._before is not None

    @property
    def recording(self) -> bool:
        """Whether the present forward is recorded, or was recorded last."""
        return self._tape is not None

    # What is seen of a step before it is made.

    @contextlib.contextmanager
    def record(self, step: int) -> Iterator[None]:
        """Record the forward within, if the step is to be reviewed."""
        self._tape = None
        planned = self.region.active and self.region.review_planned(step) and self._before is None
        # The first forward of a lazy module makes its parameters, of which there is nothing to replay yet.
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
        """Record nothing until :meth:`resume`: neither backwards nor optimizer steps are parts of a loss."""
        if self._tape is not None:
            self._tape.paused = True

    def resume(self) -> None:
        """Record again, if a recording is still open."""
        if self._tape is not None:
            self._tape.paused = False

    def note_loss(self, loss: Tensor, loss_scale: float) -> None:
        """Note a loss whose backward follows, and forget those whose gradient has been thrown away."""
        # An optimizer that calls its closure again has moved away from where the step begins.
        if not self.region.active or self._before is not None:
            return
        self._forget_thrown_away()
        value = loss.detach() / loss_scale if loss_scale != 1 else loss.detach()
        recorded = self._tape.locate(loss) if self._tape is not None else None
        if recorded is not None:
            recorded = replace(recorded, factor=recorded.factor / loss_scale)
        self._losses.append(SeenLoss(value, recorded, self._trained_by(loss)))

    def _trained_by(self, loss: Tensor) -> dict[int, Tensor]:
        if len(self._optimizers) > 1 and loss.grad_fn is not None:
            return _leaves(loss.grad_fn)
        return {id(p): p for p in self._model.parameters() if p.requires_grad}

    def _forget_thrown_away(self) -> None:
        """Forget losses whose gradient was set to zero since: they are no part of the coming step."""
        for seen in self._losses:
            seen.parameters = _with_gradient(seen.parameters)
        self._losses = [seen for seen in self._losses if seen.parameters]

    def forget_losses(self) -> None:
        """Forget the losses that were seen, and the step that they were for."""
        self._losses, self._before = [], None

    def cancel(self) -> None:
        """Do without the review of this step."""
        self._before = None

    def release(self) -> None:
        """Let go of the last recording, unless a step waits for it."""
        self._tape = None

    def stepped(self, parameters: Iterable[Tensor], optimizer: Optimizer | None) -> None:
        """Note that an optimizer has stepped: its losses have been used."""
        if not self.region.active:
            return
        own = {id(parameter) for parameter in parameters}
        if optimizer is not None:
            self._optimizers[id(optimizer)] = own
        others: set[int] = set().union(*self._optimizers.values()) if self._optimizers else set()
        for seen in self._losses:
            seen.parameters = {key: p for key, p in seen.parameters.items() if key in others and key not in own}
        self._losses = [seen for seen in self._losses if seen.parameters]

    def most_decrease(self, parameters: Iterable[Tensor], *, never_negative: bool) -> float | None:
        """What the slope of the coming step may promise; None for anything. Collective: call on every rank.

        Args:
            parameters: Those that the coming step moves.
            never_negative: Whether the loss is known to have no less than 0 in it.
        """
        if not self.region.adapts_radius:
            return None
        losses = self._losses_of(parameters)
        device = next(self._model.parameters()).device
        own = sum(float(seen.value) for seen in losses)
        loss, unknown = distributed.mean([own, float(not (never_negative and losses))], device)
        return MOST_PROMISED * loss if not unknown and math.isfinite(loss) and loss > 0 else None

    def before_step(
        self,
        step: int,
        size: float,
        damping: float,
        optimizer: Optimizer | None,
        parameters: Sequence[nn.Parameter],
        loss_scale: float,
        loss_gradients: Mapping[int, Tensor],
    ) -> None:
        """Keep what a review of the coming step needs, if one is due; the gradients are still the loss's.

        Collective: call on every rank.

        Args:
            step: The optimizer step.
            size: The squared norm of the step in the Fisher metric, before clipping; 0 where there is none.
            damping: In force at this step; where it does not set itself, what the step is held against.
            optimizer: The optimizer that is about to step.
            parameters: Those that it steps.
            loss_scale: What the gradients are multiplied by.
            loss_gradients: By the ``id`` of a parameter: the gradient of the loss, where it has been replaced already.
        """
        if not self.region.active or size <= 0 or self._before is not None:
            return
        planned = self.region.review_planned(step)
        self.region.note_size(size)
        if not planned:
            return
        losses = self._losses_of(parameters)
        refusal = self._tape.refusal if self._tape is not None else None
        known = [seen.recorded for seen in losses if seen.recorded is not None]
        stale = any(recorded.is_stale() for recorded in known)
        missing = refusal is None and (not losses or len(known) < len(losses) or stale)
        needs_collectives = any(recorded.needs_collectives for recorded in known)
        refused, missed, with_collectives = self._any_rank(refusal is not None, missing, needs_collectives)
        if refused:
            self.end(refusal or "the forward of another rank cannot be replayed")
        elif missed:
            self._miss(
                "the losses of the step were computed outside the recorded training step, or what they depend on has "
                "been written since"
            )
        elif self._checked or self._gives_again(losses, {}, with_collectives=with_collectives):
            self._checked = True
            if not self.region.adapts_damping:
                self.region.damping = damping
            self._before = Before.of(optimizer, parameters, losses, loss_scale, loss_gradients, size, with_collectives)

    def _losses_of(self, parameters: Iterable[Tensor]) -> list[SeenLoss]:
        own = {id(parameter) for parameter in parameters}
        return [seen for seen in self._losses if not own.isdisjoint(seen.parameters)]

    def _gives_again(self, losses: Sequence[SeenLoss], values: Mapping[int, Tensor], *, with_collectives: bool) -> bool:
        """Whether replays with unmoved weights give the losses; where not, reviews end. Collective."""
        own, reason = sum(float(seen.value) for seen in losses), ""
        try:
            again = _replayed(losses, values, with_collectives=with_collectives)
            tolerance = max(REPLAY_TOLERANCE, 4 * torch.finfo(losses[0].value.dtype).eps)
            if not abs(again - own) <= tolerance * abs(own):
                reason = f"replayed without any change, its loss is {again:.9g} and not {own:.9g}"
        except Exception as error:
            reason = str(error)
        (failed,) = self._any_rank(bool(reason))
        if failed:
            self.end(reason or "the replay of another rank does not give its loss again")
        return not failed

    def _any_rank(self, *facts: bool) -> list[bool]:
        """Which facts hold on any rank. Collective."""
        device = next(self._model.parameters()).device
        return [share > 0 for share in distributed.mean([float(fact) for fact in facts], device)]

    # The review.

    def review(self, layers: Iterable[Layer], optimizer: Optimizer | None) -> Verdict | None:
        """Replay the step's losses, adjust the region, and shorten the step where it went wrong. Collective.

        Args:
            layers: The layers.
            optimizer: The optimizer that has stepped, where it is known.

        Returns:
            What followed; None where no review was due, or nothing has changed.
        """
        before = self._before
        if before is None or (before.optimizer is not None and before.optimizer is not optimizer):
            return None
        before, self._before = replace(before, optimizer=optimizer), None
        loss_after, error = math.nan, ""
        try:
            loss_after = before.replay()
        except Exception as raised:
            # An operation whose sizes depend on the weights, for one, does not fit those that were recorded.
            error = str(raised)
        device = next(self._model.parameters()).device
        # A rank that cannot evaluate says so, instead of leaving the others to wait for its loss.
        loss_before, loss_after, failed = distributed.mean([before.loss, loss_after, float(bool(error))], device)
        if failed:
            self._miss(error or "another rank could not replay its loss")
            return None
        with torch.no_grad(), full_precision(self._model):
            outcome = before.outcome(layers, loss_before, loss_after)
        if outcome is None:
            return None
        self._misses = 0
        outcome = replace(outcome, curvature=self._total(outcome.curvature))
        verdict = self.region.judge(outcome, before.size)
        if verdict.kept < 1 and not before.can_shorten:
            verdict = replace(verdict, undo=False, kept=1.0)
        if verdict.kept < 1:
            then = {id(p): value for p, value in zip(before.parameters, before.values, strict=True)}
            # Nothing is undone because of a replay that was wrong.
            if not self._gives_again(before.losses, then, with_collectives=before.with_collectives):
                return None
            before.shorten(verdict.kept)
            self._events.count("undone_steps" if verdict.undo else "shortened_steps")
        self.last = verdict
        return verdict

    def _miss(self, reason: str) -> None:
        self._events.count("missed_reviews")
        self._misses += 1
        if self._misses >= MISSES_ALLOWED:
            self.end(reason)

    def end(self, reason: str) -> None:
        """Review nothing any more, and say why.

        Args:
            reason: Why steps cannot be reviewed.
        """
        automatic = [
            name
            for name, adapts in (("damping", self.region.adapts_damping), ("kl_clip", self.region.adapts_radius))
            if adapts
        ]
        self.fix()
        if distributed.rank() == 0 and automatic:
            values = {"damping": self.region.damping, "kl_clip": self.region.radius}
            fixed = " and ".join(f"{name}={values[name]:.3g}" for name in automatic)
            chosen = " and ".join(f"{name}='auto'" for name in automatic)
            warnings.warn(
                f"KFC can no longer review steps, which {chosen} needs: {reason}. It goes on with {fixed}. "
                "Set these to silence this.",
                stacklevel=2,
            )

    def fix(self) -> None:
        """Set nothing automatically from now on: what was "auto" gets its documented fixed value."""
        region = self.region
        region.radius = FIXED_RADIUS if region.adapts_radius else region.radius
        region.damping = FIXED_DAMPING if region.adapts_damping else region.damping
        region.adapts_radius = region.adapts_damping = False
        self.forget_losses()


def _replayed(losses: Sequence[SeenLoss], values: Mapping[int, Tensor], *, with_collectives: bool) -> float:
    return sum(
        seen.recorded.replay(values, with_collectives=with_collectives) for seen in losses if seen.recorded is not None
    )


def _with_gradient(parameters: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Those of the parameters that have a gradient that is not zero."""
    gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None and p.grad.numel()}
    if not gradients:
        return {}
    with torch.no_grad():
        parts = [dense(distributed.own_part(gradient)) for gradient in gradients.values()]
        # Brought together first: to ask for each would wait for each.
        largest = torch.stack([part.abs().amax().float().to(parts[0].device) for part in parts])
    return {key: parameters[key] for key, value in zip(gradients, largest.tolist(), strict=True) if value != 0}


def _leaves(node: Node) -> dict[int, Tensor]:
    """The parameters whose gradient a backward from a node brings, by ``id``."""
    found: dict[int, Tensor] = {}
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        variable = getattr(current, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        pending += [below for below, _ in current.next_functions if below is not None]
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    # Summed in float64: a slope is a small sum of large terms near the minimum.
    return float(torch.sum(a * b, dtype=torch.float64))
