"""One call of a module's forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_kfc.factors.sparse import dense

#: Called as ``hook(module, args, kwargs, output)``.
ForwardHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]

#: Returns input rows times one direction, ``(examples, positions, groups)``.
Probe = Callable[[], Tensor]


@dataclass(frozen=True)
class Forward:
    """The inputs of one call of a module's forward, and its output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None

    def first(self, name: str = "input") -> Tensor:
        """The first input, given by position or by ``name``; a sparse one as a dense one."""
        value = self.args[0] if self.args else self.kwargs[name]
        assert isinstance(value, Tensor)
        return dense(value)
