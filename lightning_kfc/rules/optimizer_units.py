"""The learning rate of a rule, and its updates, in the units of the optimizer that steps by them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.rules.adam import LEARNING_RATE
from lightning_kfc.rules.momentum import momenta, take_momentum_out


class Units:
    """What an optimizer's learning rate, and its momentum, are for a rule.

    The rule "natural" steps by the optimizer's own, and leaves it its momentum. The rule "adam" has a momentum of its
    own and takes the optimizer's out; its learning rate is a share of the one that the optimizer has with its momentum.

    Args:
        rule: The rule.
        optimizer: The one that is about to step; None where it is not known, and has no momentum.
    """

    def __init__(self, rule: str, optimizer: Optimizer | None) -> None:
        self._changed = rule == "adam"
        self._optimizer = optimizer
        self._momenta = momenta(optimizer) if self._changed else {}

    def learning_rate(self, layer: Layer, rate: float) -> float:
        """The rule's learning rate for a layer, given the optimizer's."""
        first = next(iter(layer.trained_parameters().values()))
        return rate * self._share(first)

    def ask(self, layers: Iterable[Layer], loss_scale: float) -> None:
        """Change updates, which stand in the place of gradients, into what makes the optimizer step by them.

        Args:
            layers: Those that have updates.
            loss_scale: What the updates are multiplied by, since a gradient scaler will undo it.
        """
        if not self._changed:
            return
        # By identity: the projections of an attention layer share a parameter, of which each has written a part.
        written = {id(p): p for layer in layers for p in layer.trained_parameters().values()}.values()
        for parameter in written:
            if parameter.grad is not None:
                parameter.grad.mul_(self._share(parameter))
        if self._momenta and self._optimizer is not None:
            take_momentum_out(self._optimizer, (p for p in written if id(p) in self._momenta), loss_scale)

    def _share(self, parameter: nn.Parameter) -> float:
        return LEARNING_RATE / (1 - self._momenta.get(id(parameter), 0.0)) if self._changed else 1.0
