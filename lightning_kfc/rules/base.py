"""Replaces the gradients of layers by their updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors.inverses import FewRows, Inverse
from lightning_kfc.monitoring.events import Events, StepNumbers, listed
from lightning_kfc.rules.adam import AdamStep, adam_step
from lightning_kfc.rules.natural import NaturalStep, natural_step


@dataclass(frozen=True)
class Ready:
    """A layer with its gradient, at the time of the step.

    Attributes:
        layer: The layer, which has an inverse.
        gradient: Shape ``(groups, d_out, d_in)``, in float32 or better.
        learning_rate: That of its parameters in this step.
        solved: In the place of the layer's inverse, where a rank has made the update for all.
        fallback: In the place of the layer's previous inverse, likewise.
    """

    layer: Layer
    gradient: Tensor
    learning_rate: float
    solved: Inverse | None = None
    fallback: Inverse | None = None


#: Called with the layers of a step and their updates, while gradients are still the loss's.
Inspection = Callable[[Sequence[Ready], Sequence[Tensor]], None]


def solve(
    ready: Sequence[Ready], damping: float, kl_clip: float | None, most_decrease: float | None = None
) -> NaturalStep:
    """The updates of layers, by their inverses or by what has come in the place of these.

    Args:
        ready: The layers.
        damping: In force at this step, for inverses that can follow it.
        kl_clip: The bound of E7, or None.
        most_decrease: The bound on what the slope of the step may promise, or None.
    """
    chosen = [entry.solved or entry.layer.inverse for entry in ready]
    inverses = [
        inverse.at_damping(damping).for_rows(entry.layer.rows)
        for entry, inverse in zip(ready, chosen, strict=True)
        if inverse is not None
    ]
    previous = [entry.fallback or entry.layer.previous_inverse for entry in ready]
    fallbacks = [inverse and inverse.at_damping(damping) for inverse in previous]
    gradients, rates = [entry.gradient for entry in ready], [entry.learning_rate for entry in ready]
    result = natural_step(gradients, inverses, rates, kl_clip, fallbacks, most_decrease)
    for entry, inverse in zip(ready, inverses, strict=True):
        if isinstance(inverse, FewRows) and inverse.missed:
            # A penalty on the weights, for one, is a gradient of no rows. Asked again when statistics are taken again.
            entry.layer.rows = None
    return result


def replace_gradients(
    rule: str,
    ready: Sequence[Ready],
    step: int,
    damping: float,
    kl_clip: float | None,
    most_decrease: float | None,
    loss_scale: float,
    events: Events,
    before_writing: Callable[[float], None] = lambda size: None,
    inspect: Inspection | None = None,
) -> StepNumbers:
    """Write the update of each layer in the place of its gradient.

    Args:
        rule: How gradients and inverses make an update.
        ready: The layers.
        step: The optimizer step.
        damping: In force at this step, for inverses that can follow it.
        kl_clip: The bound of E7, or None.
        most_decrease: The bound on what the slope of a step of the rule "natural" may promise, or None.
        loss_scale: What the updates are multiplied by, since a gradient scaler will undo it.
        events: Counts what goes other than planned.
        before_writing: Called with the squared norm of the step before clipping, while gradients are still the loss's.
        inspect: Called with the updates, likewise.
    """
    result = _adam(ready, kl_clip) if rule == "adam" else solve(ready, damping, kl_clip, most_decrease)
    before_writing(result.quadratic)
    if inspect is not None:
        inspect(ready, result.updates)
    if isinstance(result, AdamStep):
        _write_adam(ready, result, step, loss_scale, events)
    else:
        _write_natural(ready, result, step, loss_scale, events)
    return StepNumbers(step, damping, result.clip, result.quadratic / 2, kl_clip)


def _write_natural(ready: Sequence[Ready], result: NaturalStep, step: int, loss_scale: float, events: Events) -> None:
    plain = []
    for position, (entry, update) in enumerate(zip(ready, result.updates, strict=True)):
        layer = entry.layer
        if position in result.restored:
            layer.go_back()
        if position in result.failed or not _write(layer, update, loss_scale):
            plain.append(layer.name)
        else:
            layer.previous_inverse = None
    if result.restored:
        names = listed(ready[position].layer.name for position in result.restored)
        events.report(
            "restored_inverses", step, f"the new inverse of {names} gives no usable update; the last one is kept"
        )
    if plain:
        what = f"no inverse gives {listed(plain)} a usable update; the gradient is used"
        events.report("nonfinite_updates", step, what)


def _adam(ready: Sequence[Ready], kl_clip: float | None) -> AdamStep:
    layers = [entry.layer for entry in ready]
    return adam_step(
        [entry.gradient for entry in ready],
        [layer.moments for layer in layers],
        [layer.inverse for layer in layers if layer.inverse is not None],
        [layer.curvature() for layer in layers],
        [entry.learning_rate for entry in ready],
        kl_clip,
    )


def _write_adam(ready: Sequence[Ready], result: AdamStep, step: int, loss_scale: float, events: Events) -> None:
    """Keep the moments, too; there is no other inverse to fall back upon."""
    unwritten = []
    for entry, update, moments in zip(ready, result.updates, result.moments, strict=True):
        layer = entry.layer
        layer.moments, layer.previous_inverse = moments, None
        if not _write(layer, update, loss_scale):
            unwritten.append(layer.name)
    if result.failed:
        names = listed(ready[position].layer.name for position in result.failed)
        events.report("nonfinite_updates", step, f"the update of {names} is not finite; nothing moves there")
    if unwritten:
        what = f"float16 cannot hold the update of {listed(unwritten)}; the gradient is used"
        events.report("nonfinite_updates", step, what)


def _write(layer: Layer, update: Tensor, loss_scale: float) -> bool:
    return layer.write(update if loss_scale == 1 else update * loss_scale)
