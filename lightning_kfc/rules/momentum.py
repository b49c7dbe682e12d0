"""Remove SGD's momentum from its step, all of it for rules with their own, or what exceeds a limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.factors.sparse import SPARSE, dense
from lightning_kfc.utilities.torch_internals import add, scale


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's SGD or a subclass."""
    return any(cls.__name__ == "SGD" for cls in type(optimizer).__mro__)


def momenta(optimizer: Optimizer | None, above: float = 0.0) -> dict[int, float]:
    """The removable momentum of each parameter, by its ``id``, where it is above a number."""
    if optimizer is None or not is_sgd(optimizer):
        return {}
    return {
        id(parameter): float(group["momentum"])
        for group in optimizer.param_groups
        if above < group.get("momentum", 0) < 1 and group.get("dampening", 0) < 1
        for parameter in group["params"]
    }


def of_layers(trained: Mapping[str, Mapping[str, nn.Parameter]], known: Mapping[int, float]) -> dict[str, float]:
    """The momentum of each layer's first trained parameter; 0 where none is known.

    Args:
        trained: The trainable parameters by role, by the layer's name.
        known: The momentum of parameters, by their ``id``.
    """
    return {name: known.get(id(next(iter(own.values()), None)), 0.0) for name, own in trained.items()}


def take_momentum_out(optimizer: Optimizer, parameters: Iterable[nn.Parameter], loss_scale: float) -> None:
    r"""Convert updates to gradients that make SGD step by them.

    With momentum :math:`\mu` and buffer b, SGD steps by :math:`b \leftarrow \mu b + d`, d the gradient with its decay.
    For a rule with its own momentum and the step u, the gradient is :math:`d = u - \mu b`; likewise with dampening and
    Nesterov's momentum. Weight decay is scaled so that it acts as strongly as with momentum.

    Args:
        optimizer: An optimizer of :func:`is_sgd`.
        parameters: The parameters whose gradient is an update.
        loss_scale: A factor on the updates, by which a gradient scaler will divide.
    """
    _convert(optimizer, parameters, loss_scale, _shares)


def limit_momentum(optimizer: Optimizer, parameters: Iterable[nn.Parameter], limit: float, loss_scale: float) -> None:
    r"""Convert updates to gradients with which SGD steps as if its momentum were no higher than a limit.

    With a momentum :math:`\mu` above the limit m, ``SGD(lr, momentum=mu)`` steps as ``SGD(lr * f, momentum=m)`` does,
    :math:`f = (1-m)/(1-\mu)`, so that steps that keep their direction become as long. For the update u with its weight
    decay, the gradient is :math:`d = f u - (\mu - m) b`, and the buffer :math:`b \leftarrow m b + f u`. With Nesterov's
    momentum the buffer is the same, and the step :math:`d + \mu b`.

    Args:
        optimizer: An optimizer of :func:`is_sgd`.
        parameters: The parameters whose gradient is an update.
        limit: m, at least 0.
        loss_scale: A factor on the updates, by which a gradient scaler will divide.
    """

    def shares(group: Mapping[str, Any], *, first: bool) -> tuple[float, float, float]:
        momentum, decay = float(group["momentum"]), float(group.get("weight_decay", 0))
        factor, sign = lengthening(momentum, limit), -1.0 if group.get("maximize") else 1.0
        taken = 1.0 if first else 1 - float(group.get("dampening", 0))
        return factor, sign * decay * (factor - 1), -sign * max(0.0, momentum - limit) / taken

    _convert(optimizer, parameters, loss_scale, shares)


def multiply_momentum(optimizer: Optimizer, shares: Iterable[tuple[nn.Parameter, float]]) -> None:
    """Multiply SGD's momentum buffers.

    Args:
        optimizer: An optimizer of :func:`is_sgd`.
        shares: Parameters, each with its factor.
    """
    alike: dict[tuple[float, int], list[Tensor]] = defaultdict(list)
    for parameter, share in shares:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            alike[share, id(parameter) if buffer.layout in SPARSE else alone(parameter)].append(buffer)
    with torch.no_grad():
        for (share, _), buffers in alike.items():
            scale(buffers, share)


def lengthening(momentum: float, limit: float) -> float:
    """The factor by which a momentum lengthens steps that keep their direction more than the limit does."""
    return max(1.0, (1 - limit) / (1 - momentum))


def alone(parameter: Tensor) -> int:
    """Equal for parameters that one operation may change together, which sharded and plain ones cannot share."""
    return id(parameter) if is_sharded(parameter) else 0


def _convert(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    loss_scale: float,
    shares: Callable[..., tuple[float, float, float]],
) -> None:
    """Replace gradients by sums of update, parameter and momentum buffer, with the shares of each group."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    alike: dict[tuple[float, float, float, int], list[tuple[Tensor, Tensor, Tensor | None]]] = defaultdict(list)
    for parameter in parameters:
        group = groups.get(id(parameter))
        if parameter.grad is None or group is None or not group["momentum"]:
            continue
        state = optimizer.state.get(parameter, {})
        buffer = state.get("momentum_buffer")
        if buffer is not None and buffer.is_sparse:
            # A sparse buffer cannot take a dense gradient.
            buffer = state["momentum_buffer"] = buffer.to_dense()
        if parameter.grad.layout in SPARSE:
            parameter.grad = dense(parameter.grad)
        key = *shares(group, first=buffer is None), alone(parameter)
        alike[key].append((parameter.grad, parameter, buffer))
    with torch.no_grad():
        for (of_update, of_parameter, of_buffer, _), members in alike.items():
            gradients = [gradient for gradient, _, _ in members]
            if of_update != 1:
                scale(gradients, of_update)
            if of_parameter:
                add(gradients, [parameter for _, parameter, _ in members], of_parameter * loss_scale)
            known = [(gradient, buffer) for gradient, _, buffer in members if buffer is not None]
            if known:
                add([gradient for gradient, _ in known], [buffer for _, buffer in known], of_buffer * loss_scale)


def _shares(group: Mapping[str, Any], *, first: bool) -> tuple[float, float, float]:
    """The factors of update, parameter and buffer whose sum is the gradient that makes SGD step by the update.

    Args:
        group: The parameter's group of the optimizer.
        first: Whether it is the parameter's first step, which has neither buffer nor dampening.
    """
    momentum, decay = float(group["momentum"]), float(group.get("weight_decay", 0))
    sign = -1.0 if group.get("maximize") else 1.0
    if group.get("nesterov"):
        # The step is d + momentum (momentum b + d).
        own, of_buffer = 1 + momentum, momentum**2
    else:
        own, of_buffer = 1.0 if first else 1 - float(group.get("dampening", 0)), momentum
    return 1 / own, sign * decay * (1 / (1 - momentum) / own - 1), -sign * of_buffer / own
