"""Weights, gradients and losses before a step, to review and to shorten it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.optimizer_step import OptimizerStep, directions
from lightning_kfc.factors.sparse import dense
from lightning_kfc.trust_region.losses_seen import SeenLoss
from lightning_kfc.trust_region.outcome import Outcome

#: The names of momentum in the state of optimizers.
MOMENTA = ("momentum_buffer", "exp_avg", "momentum")


@dataclass(frozen=True)
class StepSnapshot:
    """The state before a step.

    Attributes:
        optimizer: The optimizer that makes the step; None if it is unknown.
        parameters: The trained parameters.
        values: Their values.
        gradients: The gradients of the loss before preconditioning, by the parameter's identity.
        losses: The losses of the step, one per micro-batch.
        size: The squared norm of the step in the Fisher metric, before clipping.
        damping: The damping in force at the step.
        with_collectives: Whether the losses of some rank depend on data of other ranks.
    """

    optimizer: Optimizer | None
    parameters: Sequence[nn.Parameter]
    values: Sequence[Tensor]
    gradients: Mapping[int, Tensor]
    losses: Sequence[SeenLoss]
    size: float
    damping: float
    with_collectives: bool

    @classmethod
    def of(
        cls, coming: OptimizerStep, losses: Sequence[SeenLoss], size: float, damping: float, with_collectives: bool
    ) -> StepSnapshot:
        """Copy the present values and gradients of the parameters with a gradient."""
        trained = [parameter for parameter in coming.parameters if parameter.grad is not None]
        known, scale = coming.loss_gradients, coming.loss_scale
        gradients = {id(p): dense(known.get(id(p), p.grad)).clone() for p in trained if p.grad is not None}
        if scale != 1:
            gradients = {key: gradient / scale for key, gradient in gradients.items()}
        values = [p.detach().clone() for p in trained]
        return cls(coming.optimizer, trained, values, gradients, losses, size, damping, with_collectives)

    @property
    def loss(self) -> float:
        """This rank's loss of the step."""
        return sum(float(loss.value) for loss in self.losses)

    @property
    def values_by_id(self) -> dict[int, Tensor]:
        """The values before the step, by the parameter's identity."""
        return {id(p): value for p, value in zip(self.parameters, self.values, strict=True)}

    def replay(self) -> float:
        """Evaluate this rank's loss again, with the present parameters."""
        now = {id(p): p.detach() for p in self.parameters}
        return replayed(self.losses, now, with_collectives=self.with_collectives)

    def outcome(self, layers: Iterable[Layer], damping: float, loss_before: float, loss_after: float) -> Outcome | None:
        """The outcome of the step, from the present and the former parameters; None if no parameter has changed.

        An optimizer with ``maximize=True`` lowers the negative loss, which is the loss of the outcome.

        Args:
            layers: The layers, whose factors are the curvature.
            damping: The damping in force at the step.
            loss_before: The loss before the step, a mean over ranks.
            loss_after: The loss after the step, a mean over ranks.
        """
        deltas = {id(p): p.detach() - value for p, value in zip(self.parameters, self.values, strict=True)}
        if not any(bool(delta.any()) for delta in deltas.values()):
            return None
        slope = sum(_dot(self.gradients[key], delta) for key, delta in deltas.items())
        curvature = penalty = 0.0
        for layer in layers:
            own = {role: deltas.get(id(p)) for role, p in layer.adapter.own_parameters().items()}
            known = {role: delta for role, delta in own.items() if delta is not None}
            if not known or tuple(known) != layer.roles:
                continue
            matrix = layer.matrix(known)
            curvature += 0.5 * layer.quadratic(matrix)
            # Adam's update is not damped, so damping is no part of its model.
            if layer.moments is None:
                penalty += 0.5 * layer.damping(damping) * _dot(matrix, matrix)
        if 1 in directions(self.optimizer):
            loss_before, loss_after, slope = -loss_before, -loss_after, -slope
        return Outcome(loss_before, loss_after, slope, curvature, penalty)

    @property
    def can_shorten(self) -> bool:
        """Whether the optimizer's state can be shortened together with the weights.

        Lookahead and schedule-free optimizers hold further copies of the weights, which would not be shortened.
        """
        return self.optimizer is None or type(self.optimizer).__module__.startswith("torch.optim")

    def shorten(self, kept_share: float) -> None:
        """Multiply the step, and the optimizer's momentum after it, by a share.

        Args:
            kept_share: The share; 0 undoes the step and drops the momentum.
        """
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value if kept_share == 0 else torch.lerp(value, parameter, kept_share))
                state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
                for name in MOMENTA:
                    if isinstance(state.get(name), Tensor):
                        state[name].mul_(kept_share) if kept_share else state[name].zero_()


def replayed(losses: Sequence[SeenLoss], values: Mapping[int, Tensor], *, with_collectives: bool) -> float:
    """Evaluate the sum of the recorded losses again.

    Args:
        losses: The losses; unrecorded ones are left out.
        values: Replacements of parameters, by the parameter's ``id``.
        with_collectives: Whether to run also collectives that no loss depends on.
    """
    return sum(
        seen.recorded.replay(values, with_collectives=with_collectives) for seen in losses if seen.recorded is not None
    )


def _dot(a: Tensor, b: Tensor) -> float:
    if a.is_complex():
        # Torch's complex gradient has the real part's as real, the imaginary part's as imaginary part.
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    # In float64: near the minimum, a slope is a small sum of large terms.
    return float(torch.sum(a * b, dtype=torch.float64))
