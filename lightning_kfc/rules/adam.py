r"""Adam in the Fisher's eigenbasis: the rule ``"adam"``.

With the eigenvectors :math:`Q_A, Q_G` and eigenvalues :math:`\lambda_A, \lambda_G` of a layer's factors,
:math:`P = Q_G^\top \nabla\bar W Q_A`, and Adam's moments M and S of P (Kingma & Ba 2015, arXiv:1412.6980; with
Nesterov's momentum: Dozat 2016), the step is

.. math::
    \Delta = -\eta \sqrt{200 / (d_{in} + d_{out})}\;
    Q_G [\hat M \oslash (\sqrt{\hat S} + \epsilon) \circ w] Q_A^\top

with :math:`w \propto (\lambda_G\lambda_A^\top + 0.01\,\mathrm{mean})^{-1/4}`, of mean square 1. SOAP (Vyas et al. 2024,
arXiv:2409.11321) makes the same step in the bases of the gradient's second moments, without w, which prefers directions
of small curvature. All steps together are shortened to :math:`\sum\langle G\Delta A, \Delta\rangle \le \kappa`.

So that one optimizer suits both rules, :math:`\eta` is 0.02 times the optimizer's learning rate with momentum,
:math:`\mathrm{lr}/(1-\mu)`, and the optimizer's momentum is removed from the step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.optimizer_step import OptimizerStep
from lightning_kfc.factors.eigenbasis import Eigenbasis
from lightning_kfc.factors.inverses import EighInverse, Inverse
from lightning_kfc.factors.moments import Moments, eigenbasis, stack
from lightning_kfc.factors.quadratic_form import quadratic_form
from lightning_kfc.monitoring.events import Events, listed
from lightning_kfc.rules.base import ReadyLayer, Rule, Updates, write_update, written_parameters
from lightning_kfc.rules.momentum import alone, momenta, of_layers, take_momentum_out
from lightning_kfc.rules.natural import clip_factor
from lightning_kfc.utilities.torch_internals import scale

#: :math:`\eta` if the optimizer's learning rate, divided by 1 - momentum, is 1.
LEARNING_RATE = 0.02
#: The floor of a direction's curvature in w, as a share of the mean curvature.
LEAST_CURVATURE = 0.01
#: A layer of d_in + d_out = WIDTH moves by the learning rate in each direction of the basis; wider layers move less.
WIDTH = 200.0
#: The most elements of a layer whose tensors are stacked with those of layers like it: one operation on a small tensor
#: takes as long as on several. For larger ones a copy costs more.
LARGEST_STACKED = 2**15


@dataclass(frozen=True)
class AdamUpdates(Updates):
    r"""The updates of one step of the rule ``"adam"``.

    Attributes:
        tensors: :math:`-\Delta/\eta` per layer, shaped as the gradients; zero for updates that are not finite.
        clip: The factor of all updates that keeps the step within the bound; 1 for shorter steps.
        quadratic: :math:`\sum\langle G\Delta A, \Delta\rangle` before the clip, twice the KL of the step.
        failed: The positions of the layers whose update is not finite.
        moments: The moments per layer after the step; unchanged for updates that are not finite.
    """

    moments: tuple[Moments, ...] = ()


class AdamRule(Rule[AdamUpdates]):
    """Adam in the eigenbasis of the factors; its own momentum replaces SGD's."""

    moments_per_parameter: ClassVar[int] = 2

    def learning_rates(self, coming: OptimizerStep) -> dict[str, float]:
        r""":math:`\eta` of each layer, a share of :math:`\mathrm{lr}/(1-\mu)`."""
        known = of_layers(coming.trained, momenta(coming.optimizer))
        return {name: coming.rates[name] * _share(own) for name, own in known.items()}

    def updates(
        self, ready: Sequence[ReadyLayer], damping: float, kl_clip: float | None, most_decrease: float | None = None
    ) -> AdamUpdates:
        """Compute the updates, without damping or ``most_decrease``; see :class:`Rule`."""
        layers = [entry.layer for entry in ready]
        return adam_step(
            [entry.gradient for entry in ready],
            [layer.moments for layer in layers],
            [layer.inverse for layer in layers if layer.inverse is not None],
            # The running factors of a layer with an eigenbasis are not read: unpacking them has a cost.
            [{} if eigenbasis(layer.inverse) is not None else layer.curvature() for layer in layers],
            [entry.learning_rate for entry in ready],
            kl_clip,
        )

    def write(
        self,
        ready: Sequence[ReadyLayer],
        updates: AdamUpdates,
        optimizer: Optimizer | None,
        loss_scale: float,
        step: int,
        events: Events,
    ) -> None:
        """Write the updates in the optimizer's units; see :class:`Rule`."""
        unwritten = []
        for entry, update, moments in zip(ready, updates.tensors, updates.moments, strict=True):
            layer = entry.layer
            layer.take_moments(moments)
            # Moments in the former basis do not exist any more.
            layer.confirm_inverse()
            if not write_update(entry, update, loss_scale):
                unwritten.append(layer.name)
        if updates.failed:
            names = listed(ready[position].layer.name for position in updates.failed)
            events.report(
                "nonfinite_updates", step, f"the update of {names} is not finite; these parameters do not change"
            )
        if unwritten:
            what = f"float16 cannot hold the update of {listed(unwritten)}; the gradient is used"
            events.report("nonfinite_updates", step, what)
        _in_units_of(optimizer, written_parameters(ready), loss_scale)

    def forget_momentum(self, layers: Iterable[Layer]) -> None:
        """Drop the first moments of these layers."""
        for layer in layers:
            layer.forget_momentum()


def _in_units_of(optimizer: Optimizer | None, written: Sequence[nn.Parameter], loss_scale: float) -> None:
    """Convert written updates to gradients that make the optimizer step by them.

    Args:
        optimizer: The optimizer of the step.
        written: The parameters that have updates.
        loss_scale: A factor on the updates, by which a gradient scaler will divide.
    """
    known = momenta(optimizer)
    alike: dict[tuple[float, int], list[Tensor]] = defaultdict(list)
    for parameter in written:
        if parameter.grad is not None:
            alike[_share(known.get(id(parameter), 0.0)), alone(parameter)].append(parameter.grad)
    for (share, _), gradients in alike.items():
        scale(gradients, share)
    if known and optimizer is not None:
        take_momentum_out(optimizer, (p for p in written if id(p) in known), loss_scale)


def _share(momentum: float) -> float:
    """The rule's learning rate as a multiple of an optimizer's with this momentum."""
    return LEARNING_RATE / (1 - momentum)


def curvature_weights(values: Tensor) -> Tensor:
    r"""The weights w of eigenvalues :math:`\lambda_G\lambda_A^\top`, ``(groups, d_out, d_in)``; mean square 1."""
    count = values.shape[-1] * values.shape[-2]
    mean = (values.sum((-1, -2), keepdim=True) / count).clamp_(min=torch.finfo(values.dtype).tiny)
    # The power -1/4, in a fifth of its time.
    weights = (values / mean).add_(LEAST_CURVATURE).sqrt_().rsqrt_()
    return weights.mul_(math.sqrt(count) / torch.linalg.vector_norm(weights, dim=(-1, -2), keepdim=True))


def adam_step(
    gradients: Sequence[Tensor],
    moments: Sequence[Moments | None],
    inverses: Sequence[Inverse],
    curvatures: Sequence[Mapping[str, Tensor]],
    learning_rates: Sequence[float],
    kl_clip: float | None,
) -> AdamUpdates:
    r"""Make one step of Adam in each layer's eigenbasis, scaled to the trust region.

    A layer without eigenbasis (:func:`eigenbasis`) takes Adam's step of its parameters, without w and width.

    Args:
        gradients: Per layer, shape ``(groups, d_out, d_in)``; finite.
        moments: Per layer, in the basis of its inverse; None before the first step. Moments of another shape start
            anew.
        inverses: Per layer.
        curvatures: Per layer, its factors; used for layers without eigenbasis.
        learning_rates: Per layer, :math:`\eta` of this step, by which the optimizer will multiply the update.
        kl_clip: :math:`\kappa > 0`, or None for no bound.
    """
    entries = [
        _Entry(gradient, _continued(before, gradient), eigenbasis(inverse), inverse, curvature)
        for gradient, before, inverse, curvature in zip(gradients, moments, inverses, curvatures, strict=True)
    ]
    found: dict[int, tuple[Tensor, Moments, Tensor, Tensor]] = {}
    for members in _alike(entries):
        found |= zip(members, _directions([entries[i] for i in members]), strict=True)
    if not found:
        return AdamUpdates((), 1.0, 0.0)
    updates, after, quadratics, products = map(list, zip(*(found[i] for i in range(len(found))), strict=True))
    sizes, slopes = torch.stack([torch.stack(part).double() for part in (quadratics, products)]).tolist()
    failed = tuple(i for i, size in enumerate(sizes) if not math.isfinite(size))
    for i in failed:
        updates[i], after[i] = torch.zeros_like(updates[i]), entries[i].moments
        sizes[i] = slopes[i] = 0.0
    quadratic = sum(rate**2 * size for rate, size in zip(learning_rates, sizes, strict=True))
    clip = clip_factor(quadratic, kl_clip)
    if clip < 1:
        updates = [update * clip for update in updates]
    slope = clip * sum(rate * product for rate, product in zip(learning_rates, slopes, strict=True))
    return AdamUpdates(tuple(updates), clip, quadratic, failed, slope, moments=tuple(after))


class _Entry(NamedTuple):
    """What the step of one layer is computed from; see :func:`adam_step`."""

    gradient: Tensor
    moments: Moments
    basis: Eigenbasis | None
    inverse: Inverse
    curvature: Mapping[str, Tensor]


def _continued(moments: Moments | None, gradient: Tensor) -> Moments:
    """The moments, or new ones if there are none of the gradient's shape."""
    if moments is None or moments.momentum.shape != gradient.shape:
        return Moments.none(gradient)
    return moments


def _alike(entries: Sequence[_Entry]) -> Iterable[list[int]]:
    """The positions of layers whose tensors may be stacked; a large layer is alone."""
    alike: dict[object, list[int]] = defaultdict(list)
    for i, (gradient, moments, basis, *_) in enumerate(entries):
        kind = gradient.shape, gradient.dtype, gradient.device, basis is None, moments.count
        alike[kind if gradient.numel() <= LARGEST_STACKED else i].append(i)
    return alike.values()


def _directions(alike: Sequence[_Entry]) -> Iterable[tuple[Tensor, Moments, Tensor, Tensor]]:
    r"""The steps of layers whose tensors may be stacked, without the bound.

    Returns:
        Per layer the update, the moments after it, :math:`\langle G\Delta A, \Delta\rangle` and
        :math:`\langle\Delta, \nabla\bar W\rangle`.
    """
    gradients = stack([e.gradient if e.basis is None else e.basis.project(e.gradient) for e in alike])
    # Squares must not overflow: a second moment of infinity would never decay.
    largest = 0.1 * math.sqrt(torch.finfo(gradients.dtype).max)
    gradients = gradients.clamp(-largest, largest)
    moments = Moments.stacked([e.moments for e in alike]).updated(gradients)
    directions = moments.direction(gradients)
    values = [e.inverse.values for e in alike if e.basis is not None and isinstance(e.inverse, EighInverse)]
    if values:
        curvatures = stack(values)
        directions *= curvature_weights(curvatures) * math.sqrt(WIDTH / sum(directions.shape[-2:]))
        sizes = list(torch.sum(curvatures * directions.square(), (-1, -2, -3)))
    else:
        sizes = [quadratic_form(e.curvature, own) for e, own in zip(alike, directions, strict=True)]
    # Update and gradient have the same product in any orthonormal basis.
    slopes = torch.linalg.vecdot(directions.flatten(1), gradients.flatten(1))
    updates = [own if e.basis is None else e.basis.back(own) for e, own in zip(alike, directions, strict=True)]
    return zip(updates, moments.unstacked(), sizes, slopes, strict=True)
