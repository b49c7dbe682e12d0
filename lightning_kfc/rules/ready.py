"""The layers that a step updates, with their gradients as matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.optimizer_step import OptimizerStep
from lightning_kfc.rules.base import ReadyLayer, Rule


def ready_layers(
    rule: Rule[Any],
    gradients: Mapping[Layer, Mapping[str, Tensor]],
    coming: OptimizerStep,
) -> list[ReadyLayer]:
    """The layers that have an inverse and the gradient that it is for.

    Args:
        rule: The rule, which sets their learning rates.
        gradients: By layer: the gradients of its parameters.
        coming: The step that is about to be made. Gradients are multiplied by its loss scale; the matrices are not.
    """
    usable = {layer: own for layer, own in gradients.items() if layer.inverse is not None and tuple(own) == layer.roles}
    adjusted = rule.learning_rates({layer: coming.rates[layer.name] for layer in usable}, coming.optimizer)
    ready, scale = [], coming.loss_scale
    for layer, own in usable.items():
        matrix = layer.matrix(own)
        ready.append(ReadyLayer(layer, matrix if scale == 1 else matrix / scale, adjusted[layer]))
    return ready
