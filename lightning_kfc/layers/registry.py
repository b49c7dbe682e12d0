"""Which adapter serves which class of module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_kfc.layers.adapter import Adapter

_ADAPTERS: dict[type[nn.Module], type[Adapter]] = {}
#: Classes of packages that need not be installed, by their full name.
_ADAPTERS_BY_NAME: dict[str, type[Adapter]] = {}


def register_adapter(*module_types: type[nn.Module]) -> Callable[[type[Adapter]], type[Adapter]]:
    """Make an adapter serve modules of the given types and their subclasses.

    The adapter of the nearest class in a module's method resolution order serves it; a later registration
    for the same class replaces the earlier one.

    Args:
        module_types: Classes of modules.

    Returns:
        A decorator for a subclass of :class:`~lightning_kfc.layers.adapter.Adapter`.

    Raises:
        TypeError: If a given type is not a class of modules, or the decorated class is not an adapter.
    """
    for module_type in module_types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(f"register_adapter takes subclasses of torch.nn.Module, got {module_type!r}.")

    def register(adapter: type[Adapter]) -> type[Adapter]:
        if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
            raise TypeError(f"register_adapter decorates a subclass of lightning_kfc.layers.Adapter, got {adapter!r}.")
        for module_type in module_types:
            _ADAPTERS[module_type] = adapter
        return adapter

    return register


def register_adapter_by_name(*names: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """As :func:`register_adapter`, for classes of packages that need not be installed, by ``package.module.Class``."""

    def register(adapter: type[Adapter]) -> type[Adapter]:
        _ADAPTERS_BY_NAME.update(dict.fromkeys(names, adapter))
        return adapter

    return register


def adapter_for(module: nn.Module) -> type[Adapter] | None:
    """The adapter that serves a module, or None.

    A subclass that brings its own ``forward`` computes something else than the class that was registered,
    so it is not served by that registration.
    """
    base: Any
    for base in type(module).__mro__:
        adapter = _ADAPTERS.get(base) or _ADAPTERS_BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is not None:
            unchanged = type(module).forward is base.forward
            return adapter if unchanged else None
    return None
