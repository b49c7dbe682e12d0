"""Remove SGD's momentum from its step, for rules with their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.factors.sparse import dense


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's SGD or a subclass."""
    return any(cls.__name__ == "SGD" for cls in type(optimizer).__mro__)


def momenta(optimizer: Optimizer | None) -> dict[int, float]:
    """The removable momentum of each parameter, by its ``id``."""
    if optimizer is None or not is_sgd(optimizer):
        return {}
    return {
        id(parameter): float(group["momentum"])
        for group in optimizer.param_groups
        if 0 < group.get("momentum", 0) < 1 and group.get("dampening", 0) < 1
        for parameter in group["params"]
    }


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
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    with torch.no_grad():
        for parameter in parameters:
            group = groups.get(id(parameter))
            if parameter.grad is None or group is None or not group["momentum"]:
                continue
            update = dense(parameter.grad) / loss_scale
            state = optimizer.state.get(parameter, {})
            buffer = state.get("momentum_buffer")
            if buffer is not None and buffer.is_sparse:
                # A sparse buffer cannot take a dense gradient.
                buffer = state["momentum_buffer"] = buffer.to_dense()
            parameter.grad = (_gradient_for(update, parameter, buffer, group) * loss_scale).to(parameter.grad.dtype)


def _gradient_for(update: Tensor, parameter: Tensor, buffer: Tensor | None, group: Mapping[str, Any]) -> Tensor:
    """The gradient for which SGD's step, before its learning rate, is the update with weight decay."""
    momentum, decay = float(group["momentum"]), float(group.get("weight_decay", 0))
    sign = -1.0 if group.get("maximize") else 1.0
    wanted = sign * update + (decay / (1 - momentum)) * parameter if decay else sign * update
    if group.get("nesterov"):
        # The step is d + momentum (momentum b + d).
        direction = wanted / (1 + momentum) if buffer is None else (wanted - momentum**2 * buffer) / (1 + momentum)
    else:
        # The first step has no dampening: its buffer is d.
        own = 1.0 if buffer is None else 1 - float(group.get("dampening", 0))
        direction = (wanted if buffer is None else wanted - momentum * buffer) / own
    return sign * (direction - decay * parameter if decay else direction)
