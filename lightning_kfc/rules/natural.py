"""The paper's natural gradient with a KL clip (KFC-pre): E5 and E7."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.factors.inverses import CholeskyInverse, Inverse

#: Wider layers have products of their own: copying their inverses side by side costs more than starting a product.
LARGEST_BATCHED = 512


@dataclass(frozen=True)
class NaturalStep:
    r"""The updates of one step.

    Attributes:
        updates: :math:`\nu V` per layer, shaped as the gradients, and shortened to what may be promised; where no V was
            usable, the gradient itself.
        clip: :math:`\nu`, 1 where nothing was clipped.
        quadratic: :math:`\sum \alpha^2 \langle V, \nabla\bar W\rangle`, twice the KL of the unclipped step, shortened
            to what may be promised.
        failed: The positions of the layers that no inverse gave a usable V.
        restored: The positions of the layers that only the fallback gave a usable V.
    """

    updates: tuple[Tensor, ...]
    clip: float
    quadratic: float
    failed: tuple[int, ...] = ()
    restored: tuple[int, ...] = ()


def natural_step(
    gradients: Sequence[Tensor],
    inverses: Sequence[Inverse],
    learning_rates: Sequence[float],
    kl_clip: float | None,
    fallbacks: Sequence[Inverse | None] = (),
    most_decrease: float | None = None,
) -> NaturalStep:
    r"""Precondition every layer's gradient, then scale all of them so that the step stays in the trust region.

    :math:`V = G_\lambda^{-1}\nabla\bar W A_\lambda^{-1}` (E5), then
    :math:`V \leftarrow \nu V`, :math:`\nu = \min(1, \sqrt{\kappa / \sum \alpha^2\langle V,\nabla\bar W\rangle})`
    (E7; Ba, Grosse & Martens 2017), with the learning rate of each layer's own parameter group.

    A V is usable if it is finite and a descent direction, :math:`\langle V,\nabla\bar W\rangle \ge 0`, which
    rounding can take from an inverse of very unequal eigenvalues.

    Args:
        gradients: Per layer, shape ``(groups, d_out, d_in)``; finite.
        inverses: Per layer.
        learning_rates: Per layer, :math:`\alpha` of this step.
        kl_clip: :math:`\kappa > 0`, or None for no clip.
        fallbacks: Per layer, the inverse to use instead where the first one's V is not usable, or None.
        most_decrease: Before it is clipped, the step is shortened until its slope,
            :math:`\sum\alpha\langle V,\nabla\bar W\rangle`, promises no more decrease of the loss than this; None for
            no such bound.
    """
    updates = solve_all(inverses, gradients, batched=any(gradient.device.type != "cpu" for gradient in gradients))
    if not updates:
        return NaturalStep((), 1.0, 0.0)
    products = torch.stack([_dot(*pair).double() for pair in zip(updates, gradients, strict=True)]).tolist()
    failed, restored = [], []
    for i, product in enumerate(products):
        if _is_usable(product):
            continue
        fallback = fallbacks[i] if fallbacks else None
        found = _solve_with_care(inverses[i], gradients[i])
        if found is None and fallback is not None:
            found = _solve_with_care(fallback, gradients[i])
            restored += [i] if found is not None else []
        failed += [i] if found is None else []
        updates[i], products[i] = (gradients[i], 0.0) if found is None else found
    quadratic = sum(rate**2 * product for rate, product in zip(learning_rates, products, strict=True))
    promised = sum(rate * product for rate, product in zip(learning_rates, products, strict=True))
    # First, so that the radius is held against the step that there would be without it.
    within = most_decrease / promised if most_decrease is not None and promised > most_decrease else 1.0
    quadratic *= within**2
    clip = clip_factor(quadratic, kl_clip)
    if clip * within < 1:
        updates = [update if i in failed else update.mul_(clip * within) for i, update in enumerate(updates)]
    return NaturalStep(tuple(updates), clip, quadratic, tuple(failed), tuple(restored))


def solve_all(inverses: Sequence[Inverse], gradients: Sequence[Tensor], *, batched: bool) -> list[Tensor]:
    """Every layer's V; small layers of equal shapes in one batch of products, where that is asked for.

    An accelerator spends more on starting small products than on making them. On a CPU a batch takes as long as its
    parts.

    Args:
        inverses: Per layer.
        gradients: Per layer, shape ``(groups, d_out, d_in)``.
        batched: Whether to make batches.
    """
    alike: dict[object, list[int]] = {}
    for i, (inverse, gradient) in enumerate(zip(inverses, gradients, strict=True)):
        alike.setdefault(_batch_key(inverse, gradient) if batched else i, []).append(i)
    found: dict[int, Tensor] = {}
    for key, members in alike.items():
        if len(members) == 1 or key is None:
            found |= {i: inverses[i].solve(gradients[i]) for i in members}
            continue
        of_one_kind = [inverse for i in members if isinstance(inverse := inverses[i], CholeskyInverse)]
        together = CholeskyInverse(
            torch.cat([inverse.A_inverse for inverse in of_one_kind]),
            torch.cat([inverse.G_inverse for inverse in of_one_kind]),
        )
        solved = together.solve(torch.cat([gradients[i] for i in members]))
        found |= dict(zip(members, torch.split(solved, gradients[members[0]].shape[0]), strict=True))
    return [found[i] for i in range(len(inverses))]


def _batch_key(inverse: Inverse, gradient: Tensor) -> object:
    """Equal for layers that may share a batch; None for those that are solved alone."""
    small = max(gradient.shape[-2:]) <= LARGEST_BATCHED
    if not small or type(inverse) is not CholeskyInverse or inverse.A_inverse.ndim != 3 or inverse.G_inverse.ndim != 3:
        return None
    return gradient.shape, gradient.dtype, gradient.device, inverse.A_inverse.dtype


def clip_factor(quadratic: float, kl_clip: float | None) -> float:
    r""":math:`\nu` of E7: what a step of this squared norm is multiplied by to stay within the bound."""
    return math.sqrt(kl_clip / quadratic) if kl_clip is not None and quadratic > kl_clip else 1.0


def _dot(update: Tensor, gradient: Tensor) -> Tensor:
    """Their inner product, in one pass where both lie in one piece."""
    if update.is_contiguous() and gradient.is_contiguous():
        return torch.dot(update.view(-1), gradient.view(-1))
    return torch.sum(update * gradient)


def _is_usable(product: float) -> bool:
    return math.isfinite(product) and product >= 0


def _solve_with_care(inverse: Inverse, gradient: Tensor) -> tuple[Tensor, float] | None:
    """V and its product with the gradient, summed in float64; None where V is not usable."""
    update = inverse.solve(gradient)
    product = float(torch.sum(update.double() * gradient.double()))
    return (update, product) if _is_usable(product) else None
