"""The interface of a rule: gradients and inverses in, updates out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.curvature.gradients import gradients_of, write_matrix
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.optimizer_step import OptimizerStep
from lightning_kfc.factors.inverses import Inverse
from lightning_kfc.monitoring.events import Events


@dataclass(frozen=True)
class ReadyLayer:
    """A layer with its gradient, at the time of the step.

    Attributes:
        layer: The layer, which has an inverse.
        parameters: The layer's trainable parameters, by role.
        gradient: Shape ``(groups, d_out, d_in)``, in float32 or better.
        learning_rate: The rule's learning rate for the layer's parameters in this step.
        received: Replaces the layer's inverse if another rank may have computed the update.
        fallback: Replaces the layer's previous inverse if another rank may have computed the update.
    """

    layer: Layer
    parameters: Mapping[str, nn.Parameter]
    gradient: Tensor
    learning_rate: float
    received: Inverse | None = None
    fallback: Inverse | None = None


@dataclass(frozen=True)
class Updates:
    r"""The updates of one step.

    Attributes:
        tensors: Per layer, shaped as the gradients.
        clip: The factor on all updates that keeps them within the bound; 1 if they are shorter.
        quadratic: The squared norm of the step in the Fisher metric before the clip, twice its KL.
        failed: The positions of the layers without a usable update.
        slope: :math:`\sum\alpha\langle V, \nabla\rangle`, the expected decrease of the loss to first order.
    """

    tensors: tuple[Tensor, ...]
    clip: float
    quadratic: float
    failed: tuple[int, ...] = ()
    slope: float = 0.0


#: Called with the layers of a step and their updates, while gradients are still those of the loss.
Inspection = Callable[[Sequence[ReadyLayer], Sequence[Tensor]], None]

U = TypeVar("U", bound=Updates)


class Rule(ABC, Generic[U]):
    """Computes the updates of a step, then replaces the gradients by them.

    There are two phases, so that the loss's gradients can be read between them. A rule holds no state:
    :class:`~lightning_kfc.curvature.layer.Layer` holds moments.
    """

    #: The number of values per parameter that are held from step to step.
    moments_per_parameter: ClassVar[int] = 0

    def learning_rates(self, coming: OptimizerStep) -> Mapping[str, float]:
        """The rule's learning rate for each layer of a step, by name, given the optimizer's."""
        return coming.rates

    def ready(self, gradients: Mapping[Layer, Mapping[str, Tensor]], coming: OptimizerStep) -> list[ReadyLayer]:
        """Return the layers that have an inverse and a gradient that fits it.

        Args:
            gradients: The gradients of the parameters, by layer.
            coming: The coming step. Gradients are multiplied by its loss scale; the matrices are not.
        """
        ready, scale, rates = [], coming.loss_scale, self.learning_rates(coming)
        for layer, own in gradients.items():
            if layer.inverse is not None and tuple(own) == layer.roles:
                matrix = layer.matrix(own)
                matrix = matrix if scale == 1 else matrix / scale
                ready.append(ReadyLayer(layer, coming.trained[layer.name], matrix, rates[layer.name]))
        return ready

    @abstractmethod
    def updates(
        self, ready: Sequence[ReadyLayer], damping: float, kl_clip: float | None, most_decrease: float | None = None
    ) -> U:
        """Compute the updates, without a change of gradients or layers.

        Args:
            ready: The layers.
            damping: The damping in force at this step, for inverses that can follow it.
            kl_clip: The bound of E7; None for no bound.
            most_decrease: The bound on the slope of the step; None for no bound.
        """

    def shrink_momentum(
        self, ready: Sequence[ReadyLayer], shares: Mapping[str, float], optimizer: Optimizer | None
    ) -> None:
        """Shrink the optimizer's momentum of layers whose learning rate has risen; a rule without it does nothing.

        Args:
            ready: The layers.
            shares: The last rate over that of this step, by the name of such a layer.
            optimizer: The optimizer of the step; None if unknown.
        """

    @abstractmethod
    def write(
        self,
        ready: Sequence[ReadyLayer],
        updates: U,
        optimizer: Optimizer | None,
        loss_scale: float,
        step: int,
        events: Events,
    ) -> None:
        """Replace each layer's gradient so that the optimizer steps by the update.

        Args:
            ready: The layers.
            updates: The updates of these layers, from :meth:`updates`.
            optimizer: The optimizer of the step; None if unknown, as one without momentum.
            loss_scale: A factor on the updates, by which a gradient scaler will divide.
            step: The number of the step, for warnings.
            events: Counts unusable updates.
        """

    def forget_momentum(self, layers: Iterable[Layer]) -> None:
        """Drop the rule's own momentum of these layers."""


def write_update(entry: ReadyLayer, update: Tensor, loss_scale: float) -> bool:
    """Replace a layer's gradients by its update.

    Returns:
        False if float16 cannot hold the update; the gradients then stay unchanged.
    """
    gradients = gradients_of(entry.parameters)
    assert gradients is not None
    return write_matrix(entry.layer.adapter, update if loss_scale == 1 else update * loss_scale, gradients)


def written_parameters(ready: Sequence[ReadyLayer]) -> list[nn.Parameter]:
    """The trained parameters of layers, each once: the projections of an attention layer may share a parameter."""
    return list({id(p): p for entry in ready for p in entry.parameters.values()}.values())
