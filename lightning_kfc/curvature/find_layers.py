"""Find the layers of a model, and an adapter for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.refusals import (
    COMPLEX,
    EMPTY,
    UNINITIALISED,
    check_patterns_match,
    complex_parameters,
    empty_parameters,
    left_out,
    raise_no_layer,
    refusal,
    uninitialised,
    why_not,
)
from lightning_kfc.layers import Adapter, ParameterAdapter, adapter_for
from lightning_kfc.layers.blocks import in_blocks
from lightning_kfc.layers.options import AdapterOptions
from lightning_kfc.settings import Settings
from lightning_kfc.utilities.torch_internals import parameters_of


@dataclass(frozen=True)
class FoundLayers:
    """The result of a search.

    Attributes:
        layers: The layers to precondition, by name.
        plain: The parameters that keep their plain gradient, by ``id``: their module's kind, and the reason.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    plain: dict[int, tuple[str, str]] = field(default_factory=dict)


def find_layers(model: nn.Module, settings: Settings, *, strict: bool = True) -> FoundLayers:
    """Find the layers of a model.

    Modules that share all their parameters form one layer. A parameter that is shared in any other way, or
    whose module has no adapter, becomes a separate layer with a diagonal curvature.

    Args:
        model: The model.
        settings: The settings.
        strict: Whether to raise an error if a pattern matches nothing, or if there is no layer.

    Raises:
        ValueError: If a pattern matches no module with own parameters, or no trainable parameter is left. Lazy
            modules, whose layers are found after their initialisation, count as layers.
    """
    include, exclude = settings.include, settings.exclude
    # A norm layer without scale and shift has None for both.
    owners = {n: m for n, m in model.named_modules() if any(p is not None for p in parameters_of(m).values())}
    if strict:
        check_patterns_match("include", include, owners)
        check_patterns_match("exclude", exclude, owners)
    reasons = {name: left_out(name, include, exclude) for name in owners}
    held = _held_by_parents(owners)
    found, uses = FoundLayers(), _Uses()
    for name, module in owners.items():
        reason = reasons[name] or (UNINITIALISED if uninitialised(module) else None)
        if reason is not None:
            found.plain.update(dict.fromkeys(_identities(parameters_of(module)), (type(module).__name__, reason)))
        if reason is None:
            found.plain.update({id(p): (type(module).__name__, COMPLEX) for p in complex_parameters(module)})
            found.plain.update({id(p): (type(module).__name__, EMPTY) for p in empty_parameters(module)})
        if name not in held:
            parts = {
                part: adapter
                for part, adapter in _parts(name, module, model, settings).items()
                if reasons[part if part in held else name] is None
            }
            uses.add(parts)
            served = {identity for adapter in parts.values() for identity in _identities(adapter.parameters())}
            for holder in (name, *(child for child, parent in held.items() if parent == name)):
                others = [i for i in _identities(parameters_of(owners[holder])) if i not in served]
                uses.add_other(holder, others, reasons[holder] or why_not(module, owners[holder]))
    for use in uses.explained():
        for name, adapters in use.items():
            cut = [in_blocks(adapter) for adapter in adapters]
            found.layers[name] = Layer(name, cut, inverse_precision=settings.precision.inverses)
    unexplained = {i: why for i, why in uses.unexplained().items() if i not in found.plain}
    found.layers.update(parameter_layers(model, unexplained, settings))
    to_come = any(uninitialised(module) for name, module in owners.items() if reasons[name] is None)
    if strict and not to_come and not any(layer.adapter.own_parameters() for layer in found.layers.values()):
        raise_no_layer(owners, include, exclude, held)
    return found


def parameter_layers(model: nn.Module, reasons: Mapping[int, str], settings: Settings) -> dict[str, Layer]:
    """A layer with a diagonal curvature for each of some parameters, by name.

    Args:
        model: The model.
        reasons: The reason for no Kronecker factors, by ``id`` of the parameter.
        settings: The settings.
    """
    layers = {}
    # In the model's order, which is the same on all ranks; ids are not.
    for name, parameter in model.named_parameters():
        if id(parameter) in reasons:
            module, _, own = name.rpartition(".")
            adapter = ParameterAdapter(model.get_submodule(module), own)
            layers[name] = Layer(name, [adapter], reasons[id(parameter)], settings.precision.inverses)
    return layers


class _Uses:
    """The adapters that use each parameter."""

    def __init__(self) -> None:
        self._uses: dict[object, dict[str, list[Adapter]]] = {}
        self._by_parameter: dict[int, set[object]] = {}
        self._reasons: dict[int, str] = {}

    def add(self, parts: Mapping[str, Adapter]) -> None:
        """Add the adapters of one module, by layer name; modules that share all their parameters share layers."""
        for connected in _connected(parts):
            key = tuple((type(adapter), _identities(adapter.parameters())) for adapter in connected.values())
            layers = self._uses.setdefault(key, {name: [] for name in connected})
            for adapters, adapter in zip(layers.values(), connected.values(), strict=True):
                adapters.append(adapter)
                for identity in _identities(adapter.parameters()):
                    self._by_parameter.setdefault(identity, set()).add(key)

    def add_other(self, name: str, identities: Iterable[int], reason: str) -> None:
        """Add parameters of a module without an adapter."""
        for identity in identities:
            self._by_parameter.setdefault(identity, set()).add(name)
            self._reasons[identity] = reason

    def _is_explained(self, key: object) -> bool:
        adapters = [adapter for adapters in self._uses[key].values() for adapter in adapters]
        return all(self._by_parameter[i] == {key} for a in adapters for i in _identities(a.parameters()))

    def explained(self) -> list[dict[str, list[Adapter]]]:
        """The layers whose parameters have no other use, by name."""
        return [layers for key, layers in self._uses.items() if self._is_explained(key)]

    def unexplained(self) -> dict[int, str]:
        """All other parameters, with the reason."""
        done = {key for key in self._uses if self._is_explained(key)}
        reasons = {}
        for identity, users in self._by_parameter.items():
            if not users <= done:
                tied = "shared with a module that uses it otherwise"
                beside = "its module's other parameters are shared"
                reasons[identity] = tied if len(users) > 1 else self._reasons.get(identity, beside)
        return reasons


def _parts(name: str, module: nn.Module, model: nn.Module, settings: Settings) -> dict[str, Adapter]:
    """The adapters of a module, by layer name."""
    kind = adapter_for(module)
    if kind is None or refusal(module) is not None:
        return {}
    own = AdapterOptions(
        name,
        settings.weight_sharing,
        _batch_axis(name, model),
        settings.max_factor_dim,
        settings.rows_per_dim,
        (settings.schedule.factor_every_n_steps, settings.schedule.inverse_every_n_steps),
    )
    parts = {f"{name}.{suffix}".strip("."): part for suffix, part in kind.sublayers(module, own).items()}
    return {part: adapter for part, adapter in parts.items() if adapter.parameters()}


def _connected(parts: Mapping[str, Adapter]) -> list[dict[str, Adapter]]:
    """The parts in groups without common parameters."""
    groups: list[dict[str, Adapter]] = []
    for name, adapter in parts.items():
        own = set(_identities(adapter.parameters()))
        group = {name: adapter}
        apart = []
        for other in groups:
            if own & {i for a in other.values() for i in _identities(a.parameters())}:
                group = {**other, **group}
            else:
                apart.append(other)
        groups = [*apart, group]
    return groups


def _batch_axis(name: str, model: nn.Module) -> int:
    """The axis of the examples, by ``batch_first`` of the nearest enclosing module that has it; else the first."""
    path: str | None = name
    while path is not None:
        module = model.get_submodule(path)
        # In the layers of a Transformer, the attention modules have the attribute.
        for at in (module, getattr(module, "self_attn", None)):
            batch_first = getattr(at, "batch_first", None)
            if isinstance(batch_first, bool):
                return 0 if batch_first else 1
        path = path.rpartition(".")[0] if path else None
    return 0


def _identities(parameters: Mapping[str, nn.Parameter | None]) -> tuple[int, ...]:
    return tuple(id(parameter) for parameter in parameters.values() if parameter is not None)


def _held_by_parents(owners: Mapping[str, nn.Module]) -> dict[str, str]:
    """The name of the using module, by the name of each module that only holds parameters and is never called."""
    held = {}
    for name, module in owners.items():
        kind = adapter_for(module)
        for child in () if kind is None else kind.held(module):
            if f"{name}.{child}".lstrip(".") in owners:
                held[f"{name}.{child}".lstrip(".")] = name
    return held
