"""Modules that multiply by their weights inside one function: their forward as separate products."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lightning_kfc.layers.forward import ForwardHook

#: Stands in for the module's forward; called as ``run(watch, forward, args, kwargs)``.
Run = Callable[["Watch", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Watch:
    """The hooks of a module's parts, and the forward that calls them.

    The module's ``forward`` is replaced while at least one hook is attached: on due steps only.

    Args:
        module: The module.
        run: Stands in for the forward, and calls :meth:`show` for every product.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        self.module = module
        self._run = run
        self._hooks: OrderedDict[int, tuple[str, ForwardHook]] = OrderedDict()

    def attach(self, part: str, hook: ForwardHook) -> RemovableHandle:
        """Call a hook with every product of a part."""
        if not self._hooks:
            own = self.module.__dict__.get("forward")
            self.module.forward = _WatchedForward(self, self._run, own)
        handle = _Handle(self._hooks, self.module)
        self._hooks[handle.id] = (part, hook)
        return handle

    def linear(self, part: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by a part's weight, and call the part's hooks."""
        output = F.linear(input, weight, bias)
        self.show(part, input, output)
        return output

    def show(self, part: str, input: Tensor, output: Tensor) -> None:
        """Call the hooks of a part.

        Args:
            part: The part's name.
            input: The input of its product.
            output: The result.
        """
        for name, hook in list(self._hooks.values()):
            if name == part:
                hook(self.module, (input,), {}, output)


class _Handle(RemovableHandle):
    """Removes a hook, and with the last one the replaced forward."""

    def __init__(self, hooks: OrderedDict[int, Any], module: nn.Module) -> None:
        super().__init__(hooks)
        self._hooks, self._module = hooks, module

    def remove(self) -> None:
        """See :class:`Watch`."""
        super().remove()
        watched = self._module.__dict__.get("forward")
        if not self._hooks and isinstance(watched, _WatchedForward):
            if watched.own is None:
                del self._module.forward
            else:
                self._module.forward = watched.own


class _WatchedForward:
    """Stands in for a forward; a copied or pickled module gets the real one."""

    def __init__(self, watch: Watch, run: Run, own: Any) -> None:
        self._watch, self._run = watch, run
        #: The instance's own forward, if it had been replaced before.
        self.own = own
        self._forward = watch.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self._watch.module.parameters()):
            return self._forward(*args, **kwargs)  # without hooks, the real forward may be faster
        return self._run(self._watch, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._watch.module, "forward")
