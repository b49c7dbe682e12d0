"""Follows a model whose modules and parameters change while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_kfc.curvature.find_layers import Found
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.monitoring.events import shortened


@dataclass(frozen=True)
class Change:
    """What has become of a model's layers.

    Attributes:
        kept: The present name of each layer that stays, by the name that it had.
        new: The layers that were found now.
        gone: The names of layers that are no more.
        plain: Parameters that are new and keep their plain gradient, with the reason.
    """

    kept: Mapping[str, str]
    new: Sequence[Layer]
    gone: Sequence[str]
    plain: Mapping[str, str]

    def __str__(self) -> str:
        """The change in words; empty where there is nothing to say."""
        parts = {
            "new": [f"{layer.name!r} ({_treatment(layer)})" for layer in self.new],
            "gone": [repr(name) for name in self.gone],
            "with their plain gradient": [f"{name!r} ({reason})" for name, reason in self.plain.items()],
        }
        return "; ".join(f"{what}: {shortened(names)}" for what, names in parts.items() if names)


def _treatment(layer: Layer) -> str:
    return f"{layer.adapter.treatment}, since {layer.reason}" if layer.reason else layer.adapter.kind


class Structure:
    """A model's layers, and how the model looked when they were found.

    Parameters are told by their identity; all of them are held, so that no later one has the identity of one that is
    gone. A model with sharded parameters is not followed: it shows others from its forward to its backward.

    Args:
        model: The model.
        find: Finds its layers; given whether it is an error that there is none, or that a pattern matches nothing.

    Attributes:
        found: The layers; the same object for good, changed in place.
        dropped: Why layers have no Kronecker factors whose rows do not explain their gradient, by name.
    """

    def __init__(self, model: nn.Module, find: Callable[[bool], Found]) -> None:
        self._model = model
        self._find = find
        self._outline: tuple[object, ...] = ()
        self._held: list[object] = []
        self._identities: dict[str, int] = {}
        self._dropped_as: dict[tuple[object, ...], str] = {}
        self.dropped: dict[str, str] = {}
        self.found = find(True)
        self._sharded = any(map(is_sharded, model.parameters()))
        self._note()

    def _note(self) -> None:
        self._outline = _outline(self._model)
        self._held = [*self._model.modules(), *self._model.parameters()]
        self._identities = {name: id(parameter) for name, parameter in self._model.named_parameters()}

    def identity(self, name: str, parameter: nn.Parameter) -> int:
        """What a parameter is known by in :attr:`found`; of a sharded model it may be another one meanwhile."""
        return self._identities.get(name, id(parameter)) if self._sharded else id(parameter)

    def drop(self, name: str, reason: str) -> None:
        """Give the parameters of a layer a diagonal curvature each, as long as the layer stays what it is.

        Args:
            name: The layer's name.
            reason: Why its rows do not explain its gradient.
        """
        self._dropped_as[self.found.layers[name].found_as] = reason
        self.dropped[name] = reason
        self.found.replace_by_parameters(name, self._model, reason)

    def changed(self) -> bool:
        """Whether modules or parameters were added, replaced, re-parametrised or initialised since."""
        return not self._sharded and _outline(self._model) != self._outline

    def follow(self) -> Change:
        """Find the layers of the model as it is now; a layer whose module and parameters are the same stays as it is.

        The ranks of a process group must do so at the same step.
        """
        fresh = self._find(False)
        self._drop_again(fresh)
        known: dict[tuple[object, ...], list[Layer]] = {}
        for layer in self.found.layers.values():
            if layer.unchanged:
                known.setdefault(layer.found_as, []).append(layer)
        layers: dict[str, Layer] = {}
        kept, new = {}, []
        for name, layer in fresh.layers.items():
            # Several where the parts of a module share their parameters; these come in the same order.
            same = known.get(layer.found_as)
            if not same:
                layers[name] = layer
                new.append(layer)
                continue
            layers[name] = same.pop(0)
            kept[layers[name].name] = name
            layers[name].name, layers[name].reason = name, layer.reason
        gone = [name for name in self.found.layers if name not in kept]
        plain = {
            name: fresh.plain[id(parameter)][1]
            for name, parameter in self._model.named_parameters()
            if id(parameter) in fresh.plain and id(parameter) not in self.found.plain
        }
        self.found.take_over(layers, fresh.plain)
        self._note()
        return Change(kept, new, gone, plain)

    def _drop_again(self, fresh: Found) -> None:
        """Drop the layers that were dropped before and are the same as then; forget the others."""
        before, self._dropped_as, self.dropped = self._dropped_as, {}, {}
        for name, layer in list(fresh.layers.items()):
            reason = before.get(layer.found_as)
            if reason is not None and name in fresh.layers:
                self._dropped_as[layer.found_as] = self.dropped[name] = reason
                fresh.replace_by_parameters(name, self._model, reason)


def _outline(model: nn.Module) -> tuple[object, ...]:
    """The names and identities of modules and of their own parameters, to be compared with those of another time."""
    return tuple(
        (
            name,
            id(module),
            type(module),
            *((own, id(p), p is not None and is_lazy(p)) for own, p in module._parameters.items()),
        )
        for name, module in model.named_modules()
        if module._parameters
    )
