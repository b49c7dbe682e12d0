"""Track which losses have their gradients in which parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.optim import Optimizer

from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.factors.sparse import dense
from lightning_kfc.losses.traits import LossTraits
from lightning_kfc.trust_region.replay import RecordedLoss
from lightning_kfc.utilities.autograd_graph import nodes_from
from lightning_kfc.utilities.torch_internals import parameters_of, plain_name


@dataclass
class SeenLoss:
    """A loss whose gradient is in the parameters.

    Attributes:
        value: The loss, without the factor of a gradient scaler.
        recorded: The loss on its tape; None if its forward was not recorded.
        parameters: The parameters whose gradient may contain that of the loss, by ``id``.
    """

    value: Tensor
    recorded: RecordedLoss | None
    parameters: dict[int, Tensor]


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, equal on all ranks.

    Attributes:
        value: The loss.
        never_negative: Whether it is known on all ranks to be bounded below by 0.
        magnitude: Its absolute value, or the sum of those of its terms' weights if terms cancel and it is larger.
    """

    value: float
    never_negative: bool
    magnitude: float


class LossesSeen:
    """The losses of the coming steps, one per backward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._losses: list[SeenLoss] = []
        # The ids of each stepped optimizer's parameters, in the order of their first steps.
        self._optimizers: list[set[int]] = []

    def note(self, loss: Tensor, loss_scale: float, recorded: RecordedLoss | None) -> None:
        """Add a loss whose backward follows; drop those with a zeroed gradient.

        Args:
            loss: The loss, multiplied by ``loss_scale``.
            loss_scale: The factor of a gradient scaler.
            recorded: The loss on its tape, or None.
        """
        self._drop_thrown_away()
        value = loss.detach() / loss_scale if loss_scale != 1 else loss.detach()
        if recorded is not None:
            recorded = replace(recorded, factor=recorded.factor / loss_scale)
        self._losses.append(SeenLoss(value, recorded, self._trained_by(loss)))

    def of(self, parameters: Iterable[Tensor]) -> list[SeenLoss]:
        """The losses with a gradient in any of these parameters."""
        own = {id(parameter) for parameter in parameters}
        return [seen for seen in self._losses if not own.isdisjoint(seen.parameters)]

    def of_step(self, parameters: Iterable[Tensor], device: torch.device, traits: LossTraits) -> StepLoss | None:
        """The loss of the coming step, a mean over ranks; None if any rank has none. Collective.

        Args:
            parameters: The parameters that the step moves.
            device: A device from which the process group can send.
            traits: What this rank knows of the loss.
        """
        losses = self.of(parameters)
        own = sum(float(seen.value) for seen in losses)
        values = [own, float(not losses), float(not traits.never_negative), traits.cancelling_weight]
        loss, missing, unbounded, weight = distributed.mean(values, device)
        return None if missing else StepLoss(loss, never_negative=not unbounded, magnitude=max(abs(loss), weight))

    def stepped(self, parameters: Iterable[Tensor], optimizer: Optimizer | None) -> None:
        """Drop the losses that a step has used, unless other optimizers need them.

        Args:
            parameters: The parameters that were stepped.
            optimizer: The optimizer that stepped them; None if it is unknown.
        """
        parameters = list(parameters)
        own = {id(parameter) for parameter in parameters}
        others_unknown = False
        if optimizer is not None:
            number = self.optimizer_of(parameters)
            # Beside a new optimizer there may be another one that has not stepped yet.
            others_unknown = all(own.isdisjoint(known) for known in self._optimizers)
            self._optimizers = [other - own for other in self._optimizers]
            self._optimizers[number : number + 1] = [own]
        others: set[int] = set().union(*self._optimizers)
        for seen in self._losses:
            kept = ((key, p) for key, p in seen.parameters.items() if others_unknown or key in others)
            seen.parameters = {key: p for key, p in kept if key not in own}
        self._losses = [seen for seen in self._losses if seen.parameters]

    def optimizer_of(self, parameters: Iterable[Tensor]) -> int:
        """The number of the optimizer that has stepped the first known one of these parameters; else a free number."""
        # Usually the first parameter of the first optimizer.
        found = (i for p in parameters for i, known in enumerate(self._optimizers) if id(p) in known)
        free = (i for i, known in enumerate(self._optimizers) if not known)
        return next(found, next(free, len(self._optimizers)))

    @property
    def of_several_optimizers(self) -> bool:
        """Whether several optimizers have stepped."""
        return sum(map(bool, self._optimizers)) > 1

    def forget(self) -> None:
        """Drop all losses."""
        self._losses = []

    def state(self) -> list[list[str]]:
        """The names of the parameters of each stepped optimizer, if there are several."""
        named = self._model.named_parameters(remove_duplicate=False) if len(self._optimizers) > 1 else ()
        names = {id(p): plain_name(name) for name, p in named}
        return [sorted(names[key] for key in own if key in names) for own in self._optimizers if names]

    def load(self, found: Iterable[Iterable[str]]) -> None:
        """Know the stepped optimizers by what :meth:`state` returned."""
        ids = {plain_name(name): id(p) for name, p in self._model.named_parameters(remove_duplicate=False)}
        self._optimizers = [{ids[name] for name in names if name in ids} for names in found]

    def _trained_by(self, loss: Tensor) -> dict[int, Tensor]:
        if self.of_several_optimizers and loss.grad_fn is not None:
            return _leaves(loss.grad_fn)
        own = (p for module in self._model.modules() for p in parameters_of(module).values())
        return {id(p): p for p in own if p is not None and p.requires_grad}

    def _drop_thrown_away(self) -> None:
        for seen in self._losses:
            seen.parameters = _with_gradient(seen.parameters)
        self._losses = [seen for seen in self._losses if seen.parameters]


def _with_gradient(parameters: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The parameters with a nonzero gradient."""
    gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None and p.grad.numel()}
    if not gradients:
        return {}
    with torch.no_grad():
        parts = [dense(distributed.own_part(gradient)) for gradient in gradients.values()]
        # One read for all: each read waits for the device.
        largest = torch.stack([part.abs().amax().float().to(parts[0].device) for part in parts])
    return {key: parameters[key] for key, value in zip(gradients, largest.tolist(), strict=True) if value != 0}


def _leaves(node: Node) -> dict[int, Tensor]:
    """The parameters that get a gradient by a backward from a node, by ``id``."""
    variables = (getattr(below, "variable", None) for below in nodes_from(node))
    return {id(variable): variable for variable in variables if isinstance(variable, Tensor)}
