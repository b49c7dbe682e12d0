"""The layers of a model, which may change during training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_kfc.curvature.find_layers import FoundLayers, find_layers, parameter_layers
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.monitoring.events import listed, shortened
from lightning_kfc.settings import Settings
from lightning_kfc.utilities.torch_internals import parameters_of


@dataclass(frozen=True)
class LayerChange:
    """The difference between two searches for layers.

    Attributes:
        kept: The present name of each remaining layer, by its former name.
        new: The new layers.
        gone: The names of removed layers.
        plain: New parameters that keep their plain gradient, with the reason.
    """

    kept: Mapping[str, str]
    new: Sequence[Layer]
    gone: Sequence[str]
    plain: Mapping[str, str]

    def __str__(self) -> str:
        """The change in words; empty without a change."""
        parts = {
            "new": [f"{layer.name!r} ({_treatment(layer)})" for layer in self.new],
            "gone": [repr(name) for name in self.gone],
            "with their plain gradient": [f"{name!r} ({reason})" for name, reason in self.plain.items()],
        }
        return "; ".join(f"{what}: {shortened(names)}" for what, names in parts.items() if names)


def _treatment(layer: Layer) -> str:
    return f"{layer.adapter.treatment}, since {layer.reason}" if layer.reason else layer.adapter.kind


class ModelLayers(Mapping[str, Layer]):
    """The layers of a model by name, in the model's order, and the model's outline at the search for layers.

    Parameters are compared by identity. References to all of them are held, so that no new parameter gets the identity
    of a deleted one. Changes of a model with sharded parameters are not followed: from its forward to its backward it
    has other parameters.

    Args:
        model: The model.
        settings: The settings.

    Attributes:
        plain: The parameters that keep their plain gradient, by ``id``: their module's kind, and the reason.
        dropped: The reason why a layer's rows do not rebuild its gradient, by the name of the dropped layer.

    Raises:
        ValueError: If a pattern matches nothing, or no layer is left.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        found = find_layers(model, settings)
        self._layers, self.plain = found.layers, found.plain
        self._dropped_as: dict[tuple[object, ...], str] = {}
        self.dropped: dict[str, str] = {}
        self._sharded = any(map(is_sharded, model.parameters()))
        #: The time to factorise each present layer, up to a constant; a view.
        self.costs: Mapping[str, float] = _Costs(self)
        self._note()

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        """The layers with the shapes of their factors; the text is the same on all ranks."""
        lines = []
        for name, layer in self._layers.items():
            shapes = ", ".join(f"{factor} {tuple(s)}" for factor, s in layer.adapter.factor_shapes().items())
            lines.append(f"{name} ({layer.adapter.kind}, {shapes})")
        return ", ".join(lines)

    def present(self) -> dict[str, Layer]:
        """The layers whose modules and parameters have not changed since the search for layers."""
        return {name: layer for name, layer in self._layers.items() if layer.unchanged}

    def in_model(self, name: str) -> bool:
        """Whether the model has the parameters of a layer, which need not be preconditioned."""
        named = {own for own, module in self._model.named_modules() if own and parameters_of(module)}
        named.update(own for own, _ in self._model.named_parameters(remove_duplicate=False))
        # The layer may be a part of its module.
        return not named.isdisjoint((name, name.rpartition(".")[0]))

    # Layers of an optimizer.

    def learning_rates(self, optimizer: Optimizer) -> dict[str, float]:
        """The learning rate of each layer all of whose trainable parameters belong to an optimizer.

        A layer with parameters in several groups gets the learning rate of the weight's group.
        """
        return {name: rate for name, (rate, _) in self.trained_by(optimizer).items()}

    def trained_by(self, optimizer: Optimizer) -> dict[str, tuple[float, dict[str, nn.Parameter]]]:
        """The layers of :meth:`learning_rates`, each with its trainable parameters by role.

        Raises:
            ValueError: If the optimizer has no number as the learning rate of a layer.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found = {}
        for name, layer in self.present().items():
            trained = layer.trained_parameters()
            own = [groups.get(id(parameter)) for parameter in trained.values()]
            if own and own[0] is not None and all(group is not None for group in own):
                found[name] = _rate(own[0], optimizer), trained
        return found

    def stepped_by(self, optimizer: Optimizer | None) -> list[str]:
        """The layers all of whose trainable parameters belong to an optimizer; all present layers if it is None."""
        return list(self.present() if optimizer is None else self.trained_by(optimizer))

    def parameters(self, optimizer: Optimizer | None) -> list[nn.Parameter]:
        """The parameters that an optimizer steps; all parameters of the model if it is unknown."""
        if optimizer is None:
            return list(self._model.parameters())
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    # Dropped layers.

    def drop(self, name: str, reason: str) -> None:
        """Give each parameter of a layer a diagonal curvature, until the layer changes.

        Args:
            name: The layer's name.
            reason: The reason why its rows do not rebuild its gradient.
        """
        self._dropped_as[self._layers[name].found_as] = reason
        self.dropped[name] = reason
        _replace_by_parameters(self._layers, name, self._model, reason, self._settings)

    def drop_all(self, reasons: Mapping[str, str]) -> None:
        """Drop layers, and warn on rank zero, once for each reason.

        Args:
            reasons: The reason why a layer's rows do not rebuild its gradient, by the layer's name.
        """
        for reason in dict.fromkeys(reasons.values()):
            alike = [layer for layer, own in reasons.items() if own == reason]
            for layer in alike:
                if layer in self._layers:  # else another part of its module took it along
                    self.drop(layer, reason)
            if distributed.rank() == 0:
                warnings.warn(
                    f"KFC has no Kronecker factors for {listed(alike)}: {reason}. Their parameters get a diagonal "
                    "curvature. Add them to `exclude` for their plain gradient, without this warning.",
                    stacklevel=2,
                )

    # A model that changes.

    def identity(self, name: str, parameter: nn.Parameter) -> int:
        """The key of a parameter in :attr:`plain`; for a sharded model, its ``id`` at the search for layers."""
        return self._identities.get(name, id(parameter)) if self._sharded else id(parameter)

    def changed(self) -> bool:
        """Whether modules or parameters were added, replaced, re-parametrised or initialised."""
        return not self._sharded and _outline(self._model) != self._outline

    def follow(self) -> LayerChange:
        """Find the present layers of the model; layers with the same module and parameters stay the same objects.

        Call at the same step on every rank.
        """
        fresh = find_layers(self._model, self._settings, strict=False)
        self._drop_again(fresh)
        known: dict[tuple[object, ...], list[Layer]] = {}
        for layer in self._layers.values():
            if layer.unchanged:
                known.setdefault(layer.found_as, []).append(layer)
        layers: dict[str, Layer] = {}
        kept, new = {}, []
        for name, layer in fresh.layers.items():
            # Parts of a module that share their parameters come in the same order.
            same = known.get(layer.found_as)
            if not same:
                layers[name] = layer
                new.append(layer)
                continue
            layers[name] = same.pop(0)
            kept[layers[name].name] = name
            layers[name].found_again(name, layer.reason)
        gone = [name for name in self._layers if name not in kept]
        plain = {
            name: fresh.plain[id(parameter)][1]
            for name, parameter in self._model.named_parameters()
            if id(parameter) in fresh.plain and id(parameter) not in self.plain
        }
        self._layers, self.plain = layers, fresh.plain
        self._note()
        return LayerChange(kept, new, gone, plain)

    def _note(self) -> None:
        self._outline = _outline(self._model)
        self._referenced = [*self._model.modules(), *self._model.parameters()]
        self._identities = {name: id(parameter) for name, parameter in self._model.named_parameters()}

    def _drop_again(self, fresh: FoundLayers) -> None:
        """Drop again the layers that were dropped before and have not changed; forget the others."""
        before, self._dropped_as, self.dropped = self._dropped_as, {}, {}
        for name, layer in list(fresh.layers.items()):
            reason = before.get(layer.found_as)
            if reason is not None and name in fresh.layers:
                self._dropped_as[layer.found_as] = self.dropped[name] = reason
                _replace_by_parameters(fresh.layers, name, self._model, reason, self._settings)


def _rate(group: Mapping[str, Any], optimizer: Optimizer) -> float:
    rate = group.get("lr")
    if rate is None:
        raise ValueError(
            f"KFC needs the learning rate of {type(optimizer).__name__}: a parameter group has lr=None. Give it a "
            "number, or use SGD(lr=0.5, momentum=0.5)."
        )
    return float(rate)


class _Costs(Mapping[str, float]):
    """The cost of each present layer, computed at each access, since a frozen parameter changes the cost."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> float:
        return self._layers[name].cost()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _replace_by_parameters(
    layers: dict[str, Layer], name: str, model: nn.Module, reason: str, settings: Settings
) -> None:
    """Replace a layer by one layer for each of its parameters."""
    given_up = {id(p) for adapter in layers.pop(name).adapters for p in adapter.parameters().values()}
    # The other parts of the same module would precondition these parameters a second time.
    for other in [n for n, layer in layers.items() if given_up & set(map(id, layer.parameters()))]:
        del layers[other]
    layers |= parameter_layers(model, dict.fromkeys(given_up, reason), settings)


def _outline(model: nn.Module) -> tuple[object, ...]:
    """The names and identities of modules and of their own parameters, with the precision of their factors."""
    return tuple(
        (
            name,
            id(module),
            type(module),
            *(
                (own, id(p), p is not None and (is_lazy(p), factor_dtype(p.dtype)))
                for own, p in parameters_of(module).items()
            ),
        )
        for name, module in model.named_modules()
        if parameters_of(module)
    )
