r"""Adam in the Fisher's eigenbasis: the rule ``"adam"``.

With the eigenvectors :math:`Q_A, Q_G` and eigenvalues :math:`\lambda_A, \lambda_G` of a layer's factors,
:math:`P = Q_G^\top \nabla\bar W Q_A`, and Adam's moments M and S of P (Kingma & Ba 2015, arXiv:1412.6980; with
Nesterov's momentum: Dozat 2016), the step is

.. math::
    \Delta = -\eta \sqrt{200 / (d_{in} + d_{out})}\;
    Q_G [\hat M \oslash (\sqrt{\hat S} + \epsilon) \circ w] Q_A^\top

with :math:`w \propto (\lambda_G\lambda_A^\top + 0.01\,\mathrm{mean})^{-1/4}`, of mean square 1. It is what SOAP does
(Vyas et al. 2024, arXiv:2409.11321) on the bases of the Fisher matrix instead of those of the gradient's own second
moments, and leaning towards the directions in which the predictions are flat. All steps together are shortened to
:math:`\sum\langle G\Delta A, \Delta\rangle \le \kappa`.

So that one optimizer suits both rules, :math:`\eta` is 0.02 times the learning rate that the optimizer has with its
momentum, :math:`\mathrm{lr}/(1-\mu)`, and the momentum itself is taken out of the step, which has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.factors.inverses import EighInverse, Inverse
from lightning_kfc.factors.moments import Moments, eigenbasis
from lightning_kfc.factors.quadratic_form import quadratic_form
from lightning_kfc.rules.natural import clip_factor

#: :math:`\eta` of a whole step: where the optimizer's learning rate, divided by 1 - momentum, is 1.
LEARNING_RATE = 0.02
#: w goes with this power of a direction's curvature, which counts for at least this share of the mean one.
EXPONENT, LEAST_CURVATURE = -0.25, 0.01
#: A layer of d_in + d_out = WIDTH moves by the learning rate in each direction of the basis, a wider one by less.
WIDTH = 200.0


@dataclass(frozen=True)
class AdamStep:
    r"""The updates of one step.

    Attributes:
        updates: :math:`-\Delta/\eta` per layer, shaped as the gradients; zero where it is not finite.
        moments: Per layer, after the step; those before it where the update is not finite.
        clip: What all updates were multiplied by to keep within the bound; 1 where they were not.
        quadratic: :math:`\sum\langle G\Delta A, \Delta\rangle`, twice the KL of the step before that.
        failed: The positions of the layers whose update is not finite.
    """

    updates: tuple[Tensor, ...]
    moments: tuple[Moments, ...]
    clip: float
    quadratic: float
    failed: tuple[int, ...] = ()


def curvature_weights(values: Tensor) -> Tensor:
    r"""w, for eigenvalues :math:`\lambda_G\lambda_A^\top` of shape ``(groups, d_out, d_in)``; mean square 1 a group."""
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
) -> AdamStep:
    r"""One step of Adam in each layer's eigenbasis, then all of them scaled to stay in the trust region.

    A layer without eigenbasis (:func:`eigenbasis`) takes Adam's own step of its parameters: neither w nor the width
    enter.

    Args:
        gradients: Per layer, shape ``(groups, d_out, d_in)``; finite.
        moments: Per layer, in the basis of its inverse; None before the first step. Moments of another shape start
            anew.
        inverses: Per layer.
        curvatures: Per layer, its factors; used where it has no eigenbasis.
        learning_rates: Per layer, :math:`\eta` of this step, by which the optimizer will multiply the update.
        kl_clip: :math:`\kappa > 0`, or None for no bound.
    """
    updates, after, quadratics = [], [], []
    for gradient, before, inverse, curvature in zip(gradients, moments, inverses, curvatures, strict=True):
        basis = eigenbasis(inverse)
        # Squares must not overflow: a second moment of infinity would never come down again.
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
        updates.append(update)
        after.append(new)
    if not updates:
        return AdamStep((), (), 1.0, 0.0)
    sizes = torch.stack([size.double() for size in quadratics]).tolist()
    failed = tuple(i for i, size in enumerate(sizes) if not math.isfinite(size))
    for i in failed:
        old = moments[i]
        updates[i], after[i], sizes[i] = torch.zeros_like(updates[i]), old or Moments.none(updates[i]), 0.0
    quadratic = sum(rate**2 * size for rate, size in zip(learning_rates, sizes, strict=True))
    clip = clip_factor(quadratic, kl_clip)
    if clip < 1:
        updates = [update * clip for update in updates]
    return AdamStep(tuple(updates), tuple(after), clip, quadratic, failed)
