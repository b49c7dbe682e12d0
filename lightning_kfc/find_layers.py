"""Finds the layers of a model, and an adapter for each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_kfc.layer import Layer
from lightning_kfc.layers import Adapter, ParameterAdapter, adapter_for


@dataclass
class Found:
    """What was found in a model.

    Attributes:
        layers: The layers to precondition, by name.
        plain: The parameters that keep their plain gradient, by ``id``: their module's kind, and why.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    plain: dict[int, tuple[str, str]] = field(default_factory=dict)

    def replace_by_parameters(self, name: str, model: nn.Module, reason: str) -> None:
        """Give a layer up: each of its parameters becomes a layer of its own.

        Args:
            name: The layer's name.
            model: The model, where the parameters have their names.
            reason: Why its rows do not explain its gradient.
        """
        given_up = {id(p) for adapter in self.layers.pop(name).adapters for p in adapter.parameters().values()}
        # The other parts of the same module would precondition these parameters a second time.
        for other in [n for n, layer in self.layers.items() if given_up & set(map(id, layer.parameters()))]:
            del self.layers[other]
        self._add_parameters(model, dict.fromkeys(given_up, reason))

    def _add_parameters(self, model: nn.Module, reasons: Mapping[int, str]) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for identity, reason in reasons.items():
            module, _, own = names[identity].rpartition(".")
            adapter = ParameterAdapter(model.get_submodule(module), own)
            self.layers[names[identity]] = Layer(names[identity], [adapter], reason)


def find_layers(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    weight_sharing: str = "expand",
) -> Found:
    """Find the layers of a model.

    Modules that share all their parameters form one layer. A parameter that is shared in any other way, or
    whose module has no adapter, becomes a layer of its own, with a diagonal curvature.

    Args:
        model: The model.
        include: Glob patterns over module names: only these are preconditioned.
        exclude: Glob patterns over module names: these are not.
        weight_sharing: ``"expand"`` or ``"reduce"``.

    Raises:
        ValueError: If a pattern matches no module that has parameters of its own, or no layer with an adapter is left.
    """
    owners = {name: module for name, module in model.named_modules() if module._parameters}
    _check_patterns_match("include", include, owners)
    _check_patterns_match("exclude", exclude, owners)
    found = Found()
    uses = _Uses()
    held = _held_by_parents(model)
    for name, module in owners.items():
        left_out = _left_out(name, include, exclude)
        if left_out is not None:
            for parameter in filter(None, module._parameters.values()):
                found.plain[id(parameter)] = (type(module).__name__, left_out)
            uses.add_other(name, module, left_out)
            continue
        reason = held.get(name) or _refusal(module)
        if reason is not None:
            uses.add_other(name, module, reason)
        else:
            uses.add(name, module)
    for use in uses.explained():
        for suffix, adapters in use.adapters(weight_sharing).items():
            name = f"{use.name}.{suffix}".strip(".")
            found.layers[name] = Layer(name, adapters)
    if not any(layer.adapter.own_parameters() for layer in found.layers.values()):
        _raise_no_layer(owners, include, exclude, held)
    found._add_parameters(model, {i: why for i, why in uses.unexplained().items() if i not in found.plain})
    return found


@dataclass
class _Use:
    """The modules of one kind that share all their parameters."""

    kind: type[Adapter]
    modules: dict[str, nn.Module]

    @property
    def name(self) -> str:
        return next(iter(self.modules))

    def adapters(self, weight_sharing: str) -> dict[str, list[Adapter]]:
        """The adapters of all modules, by part."""
        parts: dict[str, list[Adapter]] = {}
        for module in self.modules.values():
            for suffix, adapter in self.kind.parts(module, weight_sharing).items():
                parts.setdefault(suffix, []).append(adapter)
        return parts


class _Uses:
    """Which modules use which parameters."""

    def __init__(self) -> None:
        self._uses: dict[tuple[type[Adapter], tuple[int, ...]], _Use] = {}
        self._by_parameter: dict[int, set[object]] = {}
        self._reasons: dict[int, str] = {}

    def add(self, name: str, module: nn.Module) -> None:
        """A module whose adapter explains its parameters."""
        kind = adapter_for(module)
        assert kind is not None
        identities = _identities(module)
        key = (kind, identities)
        self._uses.setdefault(key, _Use(kind, {})).modules[name] = module
        for identity in identities:
            self._by_parameter.setdefault(identity, set()).add(key)

    def add_other(self, name: str, module: nn.Module, reason: str) -> None:
        """A module whose parameters nobody explains."""
        for identity in _identities(module):
            self._by_parameter.setdefault(identity, set()).add(name)
            self._reasons[identity] = reason

    def explained(self) -> list[_Use]:
        """The uses whose parameters are used in no other way."""
        return [use for key, use in self._uses.items() if all(self._by_parameter[i] == {key} for i in key[1])]

    def unexplained(self) -> dict[int, str]:
        """All other parameters, with the reason."""
        done = {i for key in self._uses for i in key[1] if all(self._by_parameter[j] == {key} for j in key[1])}
        reasons = {}
        for identity, users in self._by_parameter.items():
            if identity not in done:
                tied = "shared with a module that uses it otherwise"
                beside = "its module's other parameters are shared"
                reasons[identity] = tied if len(users) > 1 else self._reasons.get(identity, beside)
        return reasons


def _identities(module: nn.Module) -> tuple[int, ...]:
    return tuple(id(parameter) for parameter in module._parameters.values() if parameter is not None)


def _left_out(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str | None:
    if include is not None and not _matches(name, include):
        return "not in include"
    if exclude is not None and _matches(name, exclude):
        return "in exclude"
    return None


def _refusal(module: nn.Module) -> str | None:
    kind = adapter_for(module)
    if kind is None:
        return f"no adapter for {type(module).__name__}"
    if "weight" not in module._parameters and getattr(module, "weight", None) is not None:
        return "its weight is re-parametrised"
    return kind.refusal(module)


def _held_by_parents(model: nn.Module) -> dict[str, str]:
    """Modules that only hold weights for their parent, which never calls them, with the reason."""
    return {
        f"{name}.out_proj".lstrip("."): "MultiheadAttention uses the weight without calling the module"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns_match(option: str, patterns: Sequence[str] | None, owners: Mapping[str, nn.Module]) -> None:
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in owners):
            raise ValueError(
                f"{option} pattern {pattern!r} matches no module that has parameters. "
                f"The modules are: {', '.join(owners) or 'none'}."
            )


def _raise_no_layer(
    owners: Mapping[str, nn.Module],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    held: Mapping[str, str],
) -> None:
    lines = [
        f"  {name} ({type(module).__name__}): "
        f"{_left_out(name, include, exclude) or held.get(name) or _refusal(module) or 'frozen, or shared'}"
        for name, module in owners.items()
    ]
    raise ValueError(
        "KFC found no layer to precondition. There must be at least one module with an adapter (such as Linear or "
        "Conv2d) that is trainable and not left out. The modules with parameters are:\n"
        + ("\n".join(lines) or "  none")
    )
