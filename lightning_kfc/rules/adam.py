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
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.optimizer_step import OptimizerStep
from lightning_kfc.factors.inverses import EighInverse, Inverse
from lightning_kfc.factors.moments import Moments, eigenbasis
from lightning_kfc.factors.quadratic_form import inner_product, quadratic_form
from lightning_kfc.monitoring.events import Events, listed
from lightning_kfc.rules.base import ReadyLayer, Rule, Updates, write_update, written_parameters
from lightning_kfc.rules.momentum import alone, momenta, of_layers, take_momentum_out
from lightning_kfc.rules.natural import clip_factor
from lightning_kfc.utilities.torch_internals import scale

#: :math:`\eta` if the optimizer's learning rate, divided by 1 - momentum, is 1.
LEARNING_RATE = 0.02
#: The power of a direction's curvature in w, and its floor as a share of the mean curvature.
EXPONENT, LEAST_CURVATURE = -0.25, 0.01
#: A layer of d_in + d_out = WIDTH moves by the learning rate in each direction of the basis; wider layers move less.
WIDTH = 200.0


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
    mean = values.mean((-1, -2), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    weights = (values / mean).add_(LEAST_CURVATURE).pow_(EXPONENT)
    return weights / weights.square().mean((-1, -2), keepdim=True).sqrt()


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
    updates, after, quadratics, products = [], [], [], []
    for gradient, before, inverse, curvature in zip(gradients, moments, inverses, curvatures, strict=True):
        basis = eigenbasis(inverse)
        # Squares must not overflow: a second moment of infinity would never decay.
        largest = 0.1 * math.sqrt(torch.finfo(gradient.dtype).max)
        projected = (gradient if basis is None else basis.project(gradient)).clamp(-largest, largest)
        known = before is not None and before.momentum.shape == projected.shape
        new = (before if known and before is not None else Moments.none(projected)).updated(projected)
        update = new.direction(projected)
        if basis is not None and isinstance(inverse, EighInverse):
            update *= curvature_weights(inverse.values) * math.sqrt(WIDTH / sum(update.shape[-2:]))
            quadratics.append(torch.sum(inverse.values * update.square()))
            update = basis.back(update)
        else:
            quadratics.append(quadratic_form(curvature, update))
        products.append(inner_product(update, gradient))
        updates.append(update)
        after.append(new)
    if not updates:
        return AdamUpdates((), 1.0, 0.0)
    sizes, slopes = torch.stack([torch.stack(part).double() for part in (quadratics, products)]).tolist()
    failed = tuple(i for i, size in enumerate(sizes) if not math.isfinite(size))
    for i in failed:
        old = moments[i]
        updates[i], after[i] = torch.zeros_like(updates[i]), old or Moments.none(updates[i])
        sizes[i] = slopes[i] = 0.0
    quadratic = sum(rate**2 * size for rate, size in zip(learning_rates, sizes, strict=True))
    clip = clip_factor(quadratic, kl_clip)
    if clip < 1:
        updates = [update * clip for update in updates]
    slope = clip * sum(rate * product for rate, product in zip(learning_rates, slopes, strict=True))
    return AdamUpdates(tuple(updates), clip, quadratic, failed, slope, moments=tuple(after))
