"""The coming optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.curvature.model_layers import ModelLayers


def directions(optimizer: Optimizer | None) -> set[int]:
    """1 if an optimizer raises its loss (``maximize=True``), -1 if it lowers it; both if parameter groups differ."""
    return {-1} if optimizer is None else {1 if group.get("maximize") else -1 for group in optimizer.param_groups}


@dataclass(frozen=True)
class OptimizerStep:
    """The coming step, while the gradients are still those of the loss.

    Attributes:
        optimizer: The optimizer; None if unknown, as one without momentum.
        parameters: The parameters of the step.
        rates: The learning rate of each layer of the step, by name.
        trained: The trainable parameters of each of these layers, by role.
        loss_scale: The factor on the gradients.
        loss_gradients: The gradient of the loss, by the ``id`` of a parameter whose gradient is already replaced.
    """

    optimizer: Optimizer | None
    parameters: Sequence[nn.Parameter]
    rates: Mapping[str, float]
    trained: Mapping[str, Mapping[str, nn.Parameter]]
    loss_scale: float
    loss_gradients: Mapping[int, Tensor]

    @classmethod
    def of(
        cls,
        layers: ModelLayers,
        lr: float | None,
        optimizer: Optimizer | None,
        loss_scale: float,
        loss_gradients: Mapping[int, Tensor] | None,
    ) -> OptimizerStep:
        """The step of an optimizer, or one with the same learning rate for all layers.

        Raises:
            ValueError: If neither ``lr`` nor ``optimizer`` is given, or both are.
        """
        if optimizer is not None and lr is None:
            found = layers.trained_by(optimizer)
        elif lr is not None and optimizer is None:
            found = {name: (float(lr), layer.trained_parameters()) for name, layer in layers.present().items()}
        else:
            raise ValueError(
                "precondition() takes either lr=... or optimizer=..., for the length of the step in the KL clip."
            )
        rates = {name: rate for name, (rate, _) in found.items()}
        trained = {name: own for name, (_, own) in found.items()}
        return cls(optimizer, layers.parameters(optimizer), rates, trained, loss_scale, loss_gradients or {})
