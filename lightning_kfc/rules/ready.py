"""The layers that a step updates, with their gradients as matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.rules.base import ReadyLayer, Rule


def ready_layers(
    rule: Rule[Any],
    gradients: Mapping[Layer, Mapping[str, Tensor]],
    rates: Mapping[str, float],
    optimizer: Optimizer | None,
    loss_scale: float,
) -> list[ReadyLayer]:
    """The layers that have an inverse and the gradient that it is for.

    Args:
        rule: The rule, which sets their learning rates.
        gradients: By layer: the gradients of its parameters.
        rates: By the layer's name: the optimizer's learning rate.
        optimizer: The optimizer that is about to step; None where it is not known.
        loss_scale: The factor by which the gradients are multiplied; the matrices are not.
    """
    usable = {layer: own for layer, own in gradients.items() if layer.inverse is not None and tuple(own) == layer.roles}
    adjusted = rule.learning_rates({layer: rates[layer.name] for layer in usable}, optimizer)
    ready = []
    for layer, own in usable.items():
        matrix = layer.matrix(own)
        ready.append(ReadyLayer(layer, matrix if loss_scale == 1 else matrix / loss_scale, adjusted[layer]))
    return ready
