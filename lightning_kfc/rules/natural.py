"""The paper's natural gradient with a KL clip (KFC-pre): E5 and E7."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.curvature.optimizer_step import OptimizerStep
from lightning_kfc.factors.inverses import CholeskyInverse, FewRows, Inverse
from lightning_kfc.factors.quadratic_form import inner_product
from lightning_kfc.monitoring.events import Events, listed
from lightning_kfc.rules.base import ReadyLayer, Rule, Updates, write_update, written_parameters
from lightning_kfc.rules.momentum import is_sgd, lengthening, limit_momentum, momenta, multiply_momentum, of_layers

#: The widest layers in a batch: with wider ones, a copy of the inverses costs more than separate products.
LARGEST_BATCHED = 512
#: The highest momentum beside ``kl_clip="auto"``, that of the recommended optimizer.
HIGHEST_MOMENTUM = 0.5


@dataclass(frozen=True)
class NaturalUpdates(Updates):
    r"""The updates of one step of the rule ``"natural"``.

    Attributes:
        tensors: :math:`\nu V` per layer, shaped as the gradients, within the bound on the slope; the gradient itself
            without a usable V.
        clip: :math:`\nu`, 1 without clipping.
        quadratic: :math:`\sum \alpha^2 \langle V, \nabla\bar W\rangle`, twice the KL of the step, within the bound on
            the slope and before the clip.
        failed: The positions of the layers without a usable V from any inverse.
        restored: The positions of the layers with a usable V from the fallback alone.
        rank_exceeded: The positions of the layers whose gradient has a higher rank than their rows explain.
    """

    restored: tuple[int, ...] = ()
    rank_exceeded: tuple[int, ...] = ()


class NaturalRule(Rule[NaturalUpdates]):
    """The paper's KFC-pre (E5, E7), with the optimizer's learning rate and momentum.

    Args:
        highest_momentum: The limit of SGD's momentum (:func:`~lightning_kfc.rules.momentum.limit_momentum`); None for
            no limit.
    """

    def __init__(self, highest_momentum: float | None = None) -> None:
        self._highest_momentum = highest_momentum

    def learning_rates(self, coming: OptimizerStep) -> Mapping[str, float]:
        """The optimizer's, times the factor that replaces the momentum above the limit."""
        limited, limit = self._limited(coming.optimizer), self._highest_momentum
        if limit is None or not limited:
            return coming.rates
        known = of_layers(coming.trained, limited)
        return {name: coming.rates[name] * lengthening(own, limit) for name, own in known.items()}

    def _limited(self, optimizer: Optimizer | None) -> dict[int, float]:
        """The momentum of each parameter that is above the limit, by its ``id``."""
        return {} if self._highest_momentum is None else momenta(optimizer, above=self._highest_momentum)

    def updates(
        self, ready: Sequence[ReadyLayer], damping: float, kl_clip: float | None, most_decrease: float | None = None
    ) -> NaturalUpdates:
        """Apply the inverses; see :class:`Rule`."""
        chosen = [entry.received or entry.layer.inverse for entry in ready]
        inverses = [
            inverse.with_damping(entry.layer.damping(damping)).for_low_rank(entry.layer.rows)
            for entry, inverse in zip(ready, chosen, strict=True)
            if inverse is not None
        ]
        previous = [entry.fallback or entry.layer.previous_inverse for entry in ready]
        fallbacks = [
            inverse and inverse.with_damping(entry.layer.damping(damping))
            for entry, inverse in zip(ready, previous, strict=True)
        ]
        gradients, rates = [entry.gradient for entry in ready], [entry.learning_rate for entry in ready]
        # An owner that solves for other ranks clips nothing; the ranks that receive its update bound it after the clip.
        largest = () if kl_clip is None else _largest_norms(ready)
        return natural_step(gradients, inverses, rates, kl_clip, fallbacks, most_decrease, largest)

    def shrink_momentum(
        self, ready: Sequence[ReadyLayer], shares: Mapping[str, float], optimizer: Optimizer | None
    ) -> None:
        """Shrink the momentum of layers whose rate has risen, which then moves them no further than at the last rate.

        Updates enter the momentum within the bound at the rate of their own step. At a rate near 0 that is no bound.
        """
        if shares and optimizer is not None and is_sgd(optimizer):
            known = [entry for entry in ready if entry.layer.name in shares]
            pairs = [(p, shares[entry.layer.name]) for entry in known for p in entry.parameters.values()]
            multiply_momentum(optimizer, pairs)

    def write(
        self,
        ready: Sequence[ReadyLayer],
        updates: NaturalUpdates,
        optimizer: Optimizer | None,
        loss_scale: float,
        step: int,
        events: Events,
    ) -> None:
        """Write the updates, and confirm or restore inverses; see :class:`Rule`."""
        forget_rows(ready, updates)
        plain = []
        for position, (entry, update) in enumerate(zip(ready, updates.tensors, strict=True)):
            layer = entry.layer
            if position in updates.restored:
                layer.go_back()
            if position in updates.failed or not write_update(entry, update, loss_scale):
                plain.append(layer.name)
            else:
                layer.confirm_inverse()
        if updates.restored:
            names = listed(ready[position].layer.name for position in updates.restored)
            what = f"the new inverse of {names} gives no usable update; the last one is kept"
            events.report("restored_inverses", step, what)
        if plain:
            what = f"no inverse gives {listed(plain)} a usable update; the gradient is used"
            events.report("nonfinite_updates", step, what)
        limited, limit = self._limited(optimizer), self._highest_momentum
        if limited and optimizer is not None and limit is not None:
            limit_momentum(optimizer, (p for p in written_parameters(ready) if id(p) in limited), limit, loss_scale)


def forget_rows(ready: Sequence[ReadyLayer], updates: NaturalUpdates) -> None:
    """Forget the number of rows of layers whose gradient has a higher rank; the next statistics count them again."""
    for position in updates.rank_exceeded:
        # The gradient of a penalty on the weights, for example, has no rows.
        ready[position].layer.forget_rows()


def natural_step(
    gradients: Sequence[Tensor],
    inverses: Sequence[Inverse],
    learning_rates: Sequence[float],
    kl_clip: float | None,
    fallbacks: Sequence[Inverse | None] = (),
    most_decrease: float | None = None,
    largest: Sequence[float] = (),
) -> NaturalUpdates:
    r"""Precondition every layer's gradient, then scale all to the trust region.

    :math:`V = G_\lambda^{-1}\nabla\bar W A_\lambda^{-1}` (E5), then
    :math:`V \leftarrow \nu V`, :math:`\nu = \min(1, \sqrt{\kappa / \sum \alpha^2\langle V,\nabla\bar W\rangle})`
    (E7; Ba, Grosse & Martens 2017), with the learning rate of each layer's own parameter group.

    A V is usable if it is finite and a descent direction, :math:`\langle V,\nabla\bar W\rangle \ge 0`. Rounding in an
    inverse of very unequal eigenvalues can violate this.

    Args:
        gradients: Per layer, shape ``(groups, d_out, d_in)``; finite.
        inverses: Per layer.
        learning_rates: Per layer, :math:`\alpha` of this step.
        kl_clip: :math:`\kappa > 0`, or None for no clip.
        fallbacks: Per layer, the inverse to use if the first one's V is not usable, or None.
        most_decrease: The bound on the slope :math:`\sum\alpha\langle V,\nabla\bar W\rangle`, to which the step is
            shortened before the clip; None for no bound.
        largest: Per layer, the largest norm of V after the clip, to which a longer V is shortened; empty for no bounds.
    """
    batched = any(gradient.device.type != "cpu" for gradient in gradients)
    updates, rank_exceeded = solve_all(inverses, gradients, batched=batched)
    if not updates:
        return NaturalUpdates((), 1.0, 0.0)
    products = torch.stack([inner_product(*pair) for pair in zip(updates, gradients, strict=True)]).double().tolist()
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
    wanted = sum(rate * product for rate, product in zip(learning_rates, products, strict=True))
    # Before the clip, so that the radius bounds the shortened step.
    within = most_decrease / wanted if most_decrease is not None and wanted > most_decrease else 1.0
    quadratic *= within**2
    clip = clip_factor(quadratic, kl_clip)
    factors = _factors_on(updates, clip * within, largest)
    updates = [u if i in failed or factors[i] == 1 else u.mul_(factors[i]) for i, u in enumerate(updates)]
    slope = sum(
        rate * product * factor for rate, product, factor in zip(learning_rates, products, factors, strict=True)
    )
    return NaturalUpdates(
        tuple(updates),
        clip,
        quadratic,
        tuple(failed),
        slope,
        restored=tuple(restored),
        rank_exceeded=tuple(rank_exceeded),
    )


def _largest_norms(ready: Sequence[ReadyLayer]) -> list[float]:
    """The largest norm of each layer's update, so that one step changes the weights by no more than layers allow.

    Changes multiply from layer to layer, so that the layers with a limit share it.
    """
    # A learning rate of 0 moves nothing.
    changes = [e.layer.own_damping.largest_change if e.learning_rate else math.inf for e in ready]
    limited = sum(map(math.isfinite, changes))
    longest = [math.sqrt(e.gradient.numel()) / e.learning_rate if e.learning_rate else math.inf for e in ready]
    return [change / max(limited, 1) * norm for change, norm in zip(changes, longest, strict=True)]


def _factors_on(updates: Sequence[Tensor], factor: float, largest: Sequence[float]) -> list[float]:
    """The factor on each update: that of the clip, and a smaller one for an update that would still be too long."""
    factors = [factor] * len(updates)
    bounded = [i for i, bound in enumerate(largest) if math.isfinite(bound)]
    if bounded:
        # In float64, in which the square of no element overflows.
        norms = torch.stack([torch.linalg.vector_norm(updates[i], dtype=torch.float64) for i in bounded]).tolist()
        for i, norm in zip(bounded, norms, strict=True):
            if factor * norm > largest[i]:
                factors[i] = largest[i] / norm
    return factors


def solve_all(
    inverses: Sequence[Inverse], gradients: Sequence[Tensor], *, batched: bool
) -> tuple[list[Tensor], list[int]]:
    """Apply every layer's inverse, small layers of equal shapes in one batch.

    On an accelerator, the launch of small products takes longer than their computation. On a CPU a batch gains nothing.

    Args:
        inverses: Per layer.
        gradients: Per layer, shape ``(groups, d_out, d_in)``.
        batched: Whether to make batches.

    Returns:
        V per layer, and the positions of the layers whose gradient has a higher rank than their rows explain.
    """
    alike: dict[object, list[int]] = {}
    for i, (inverse, gradient) in enumerate(zip(inverses, gradients, strict=True)):
        alike.setdefault(_batch_key(inverse, gradient) if batched else i, []).append(i)
    found: dict[int, Tensor] = {}
    rank_exceeded: list[int] = []
    for key, members in alike.items():
        if len(members) == 1 or key is None:
            for i in members:
                found[i], exceeded = _solve_alone(inverses[i], gradients[i])
                rank_exceeded += [i] if exceeded else []
            continue
        of_one_kind = [inverse for i in members if isinstance(inverse := inverses[i], CholeskyInverse)]
        together = CholeskyInverse(
            torch.cat([inverse.A_inverse for inverse in of_one_kind]),
            torch.cat([inverse.G_inverse for inverse in of_one_kind]),
        )
        solved = together.solve(torch.cat([gradients[i] for i in members]))
        found |= dict(zip(members, torch.split(solved, gradients[members[0]].shape[0]), strict=True))
    return [found[i] for i in range(len(inverses))], rank_exceeded


def _solve_alone(inverse: Inverse, gradient: Tensor) -> tuple[Tensor, bool]:
    """V, and whether the gradient has a higher rank than the number of rows of the inverse."""
    if not isinstance(inverse, FewRows):
        return inverse.solve(gradient), False
    update = inverse.solve_by_range(gradient)
    return (inverse.whole.solve(gradient), True) if update is None else (update, False)


def _batch_key(inverse: Inverse, gradient: Tensor) -> object:
    """Equal for layers that may share a batch; None for those that are solved alone."""
    small = max(gradient.shape[-2:]) <= LARGEST_BATCHED
    if not small or type(inverse) is not CholeskyInverse or inverse.A_inverse.ndim != 3 or inverse.G_inverse.ndim != 3:
        return None
    return gradient.shape, gradient.dtype, gradient.device, inverse.A_inverse.dtype


def clip_factor(quadratic: float, kl_clip: float | None) -> float:
    r""":math:`\nu` of E7 for a step of this squared norm."""
    return math.sqrt(kl_clip / quadratic) if kl_clip is not None and quadratic > kl_clip else 1.0


def _is_usable(product: float) -> bool:
    return math.isfinite(product) and product >= 0


def _solve_with_care(inverse: Inverse, gradient: Tensor) -> tuple[Tensor, float] | None:
    """V and its product with the gradient, summed in float64; None if V is not usable."""
    update = inverse.solve(gradient)
    product = float(torch.sum(update.double() * gradient.double()))
    return (update, product) if _is_usable(product) else None
