"""The paper's natural gradient with a KL clip (KFC-pre): E5 and E7."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.factors.inverse import Inverse


@dataclass(frozen=True)
class NaturalStep:
    r"""The updates of one step.

    Attributes:
        updates: :math:`\nu V` per layer, shaped as the gradients; where V was not finite, the gradient itself.
        clip: :math:`\nu`, 1 where nothing was clipped.
        quadratic: :math:`\sum \alpha^2 \langle V, \nabla\bar W\rangle`, twice the KL of the unclipped step.
        failed: The positions of the layers whose V was not finite.
    """

    updates: tuple[Tensor, ...]
    clip: float
    quadratic: float
    failed: tuple[int, ...] = ()


def natural_step(
    gradients: Sequence[Tensor],
    inverses: Sequence[Inverse],
    learning_rates: Sequence[float],
    kl_clip: float | None,
) -> NaturalStep:
    r"""Precondition every layer's gradient, then scale all of them so that the step stays in the trust region.

    :math:`V = G_\lambda^{-1}\nabla\bar W A_\lambda^{-1}` (E5), then
    :math:`V \leftarrow \nu V`, :math:`\nu = \min(1, \sqrt{\kappa / \sum \alpha^2\langle V,\nabla\bar W\rangle})`
    (E7; Ba, Grosse & Martens 2017, sec. 4), with the learning rate of each layer's own parameter group.

    Args:
        gradients: Per layer, shape ``(groups, d_out, d_in)``.
        inverses: Per layer.
        learning_rates: Per layer, :math:`\alpha` of this step.
        kl_clip: :math:`\kappa > 0`, or None for no clip.
    """
    updates = [inverse.solve(gradient) for inverse, gradient in zip(inverses, gradients, strict=True)]
    if not updates:
        return NaturalStep((), 1.0, 0.0)
    products = torch.stack(
        [torch.sum(update * gradient).double() for update, gradient in zip(updates, gradients, strict=True)]
    ).tolist()
    failed = tuple(i for i, product in enumerate(products) if not math.isfinite(product))
    for i in failed:
        updates[i] = gradients[i]
    quadratic = sum(
        rate**2 * p for i, (rate, p) in enumerate(zip(learning_rates, products, strict=True)) if i not in failed
    )
    clip = 1.0
    if kl_clip is not None and quadratic > kl_clip:
        clip = math.sqrt(kl_clip / quadratic)
        updates = [update if i in failed else update * clip for i, update in enumerate(updates)]
    return NaturalStep(tuple(updates), clip, quadratic, failed)
