"""The adapters of classes of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_kfc.layers.adapter import Adapter

_ADAPTERS: dict[type[nn.Module], type[Adapter]] = {}
#: Classes of packages that need not be installed, by their full name.
_ADAPTERS_BY_NAME: dict[str, type[Adapter]] = {}


def register_adapter(*module_types: type[nn.Module]) -> Callable[[type[Adapter]], type[Adapter]]:
    r"""Register an adapter for modules of the given types and their subclasses.

    A layer with parameters ``weight`` and ``bias`` takes two methods: the input rows that multiply the
    weight, and the rows of the derivative at the output. The weight's gradient must be
    :math:`\sum_r g_r a_r^\top`. For example::

        class EqualizedLinear(nn.Linear):
            # its weight has a constant factor, as in StyleGAN
            def forward(self, x):
                return F.linear(x * self.in_features**-0.5, self.weight, self.bias)


        @register_adapter(EqualizedLinear)
        class EqualizedLinearAdapter(Adapter):
            def weight_input_rows(self, forward):
                x = forward.first("x") * self.module.in_features**-0.5
                return x.reshape(len(x), -1, 1, x.shape[-1])  # (examples, positions, groups, d_in)

            def output_rows(self, output_gradient):
                g = output_gradient
                return g.reshape(len(g), -1, 1, g.shape[-1])  # (examples, positions, groups, d_out)

    A layer that scales and shifts units one by one takes a single method of
    :class:`~lightning_kfc.layers.ScaleShiftAdapter`. The self-test of the first step compares the gradient from the
    rows with that of autograd. Register adapters before the callback or :class:`~lightning_kfc.KFC` is made.

    A module gets the adapter of the nearest class in its method resolution order, unless the module overrides the
    ``forward`` of that class. A later registration for the same class replaces the earlier one, also a built-in one.

    Args:
        module_types: Classes of modules, at least one.

    Returns:
        A decorator for a subclass of :class:`~lightning_kfc.layers.Adapter`.

    Raises:
        TypeError: If a given type is not a class of modules, or the decorated class is not an adapter, or lacks a
            required method.
    """
    if not module_types:
        raise TypeError("register_adapter takes the classes of modules to serve, as in @register_adapter(MyLayer).")
    for module_type in module_types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(
                "register_adapter takes the classes of modules to serve, as in @register_adapter(MyLayer); "
                f"got {module_type!r}, which is no subclass of torch.nn.Module."
            )

    def register(adapter: type[Adapter]) -> type[Adapter]:
        if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
            raise TypeError(f"register_adapter decorates a subclass of lightning_kfc.layers.Adapter, got {adapter!r}.")
        missing = sorted(getattr(adapter, "__abstractmethods__", ()))
        if missing:
            raise TypeError(f"{adapter.__name__} must define {' and '.join(f'{name}()' for name in missing)}.")
        adapter.kind = adapter.kind or module_types[0].__name__
        for module_type in module_types:
            _ADAPTERS[module_type] = adapter
        return adapter

    return register


def register_adapter_by_name(*names: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Register an adapter for classes of optional packages, by ``package.module.Class``."""

    def register(adapter: type[Adapter]) -> type[Adapter]:
        _ADAPTERS_BY_NAME.update(dict.fromkeys(names, adapter))
        return adapter

    return register


def registered_adapters() -> dict[type[Adapter], list[str]]:
    """All registered adapters, each with the names of its classes."""
    served: dict[type[Adapter], list[str]] = {}
    for module_type, adapter in _ADAPTERS.items():
        served.setdefault(adapter, []).append(module_type.__name__)
    for name, adapter in _ADAPTERS_BY_NAME.items():
        served.setdefault(adapter, []).append(name)
    return served


def adapter_for(module: nn.Module) -> type[Adapter] | None:
    """The registered adapter of a module, or None.

    A subclass with its own ``forward`` computes something else than the registered class, and has no adapter.
    """
    base: Any
    for base in type(module).__mro__:
        adapter = _ADAPTERS.get(base) or _ADAPTERS_BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is not None:
            unchanged = type(module).forward is base.forward
            return adapter if unchanged else None
    return None
