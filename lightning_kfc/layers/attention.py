"""``torch.nn.MultiheadAttention``: its query, key, value and output projections, each as a separate layer.

The module calls no submodule: all its products are computed inside
:func:`torch.nn.functional.multi_head_attention_forward`. On due steps the code of this function runs with replaced
projections, which call the real ones and pass input and output to the hooks. Masks, random numbers and results are the
same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import ForwardHook
from lightning_kfc.layers.fused_modules import Watch
from lightning_kfc.layers.linear import LinearAdapter
from lightning_kfc.layers.options import AdapterOptions
from lightning_kfc.layers.registry import register_adapter
from lightning_kfc.layers.weight_sharing import WeightSharing
from lightning_kfc.utilities.torch_internals import ATTENTION_PROJECTIONS, has_packed_projections, parameters_of

PROJECTIONS = ("q", "k", "v")

#: A common shift of all keys does not change the softmax, so the derivatives at the keys add up to zero.
SHARING = "shared by 'expand': summed over positions, the derivatives at the keys of attention are zero"


@register_adapter(nn.MultiheadAttention)
class ProjectionAdapter(LinearAdapter):
    """One projection of an attention module; each position is a row, whatever ``weight_sharing`` is.

    Args:
        module: The attention module.
        options: See :class:`Adapter`.
        watch: Calls hooks with the module's projections.
        part: ``"q"``, ``"k"``, ``"v"`` or ``"out_proj"``.
    """

    kind = "MultiheadAttention"
    module: nn.MultiheadAttention

    def __init__(self, module: nn.MultiheadAttention, options: AdapterOptions, watch: Watch, part: str) -> None:
        # Inside the attention function the batch is always the second axis.
        super().__init__(module, replace(options, batch_axis=1))
        self.sharing = WeightSharing("expand", options.name, SHARING if options.weight_sharing == "reduce" else "")
        self._watch, self._part = watch, part

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse weights that are computed from other parameters."""
        assert isinstance(module, nn.MultiheadAttention)
        packed = has_packed_projections(module)
        own = ["in_proj_weight"] if packed else [f"{part}_proj_weight" for part in PROJECTIONS]
        return None if all(name in parameters_of(module) for name in own) else "its weight is re-parametrised"

    @classmethod
    def held(cls, module: nn.Module) -> tuple[str, ...]:
        """The output projection, which is never called."""
        return ("out_proj",)

    @classmethod
    def sublayers(cls, module: nn.Module, options: AdapterOptions) -> dict[str, Adapter]:
        """The four projections."""
        assert isinstance(module, nn.MultiheadAttention)
        watch = Watch(module, _run)
        names = [*PROJECTIONS, *(["out_proj"] if "weight" in parameters_of(module.out_proj) else [])]
        return {name: cls(module, options, watch, name) for name in names}

    def attach(self, hook: ForwardHook) -> RemovableHandle:
        """See :class:`Adapter`."""
        return self._watch.attach(self._part, hook)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The projection's weight and bias; query, key and value may share one packed tensor."""
        if self._part == "out_proj":
            own, names = parameters_of(self.module.out_proj), {"weight": "weight", "bias": "bias"}
        else:
            weight = "in_proj_weight" if has_packed_projections(self.module) else f"{self._part}_proj_weight"
            own, names = parameters_of(self.module), {"weight": weight, "bias": "in_proj_bias"}
        found = {role: own.get(name) for role, name in names.items()}
        return {role: parameter for role, parameter in found.items() if parameter is not None}

    def select(self, role: str, tensor: Tensor) -> Tensor:
        """A third of a packed tensor; else the whole tensor."""
        if self._part == "out_proj" or (role == "weight" and not has_packed_projections(self.module)):
            return tensor
        return tensor.chunk(3)[PROJECTIONS.index(self._part)]


def _run(watch: Watch, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with _ShownAttention(watch):
        return forward(*args, **kwargs)


class _ShownAttention(TorchFunctionMode):
    """Intercepts the module's call of the attention function, and passes its projections to the hooks."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the attention function's own code with replaced projections; pass other functions on."""
        if func is F.multi_head_attention_forward:
            func = _with_shown_projections(func, self._watch)
        return func(*args, **(kwargs or {}))


def _with_shown_projections(function: Any, watch: Watch) -> Callable[..., Any]:
    leading: list[int] = []

    def project_in(name: str) -> Callable[..., Any]:
        real = function.__globals__[name]

        def shown(query: Tensor, key: Tensor, value: Tensor, *weights: Any) -> Any:
            projected = real(query, key, value, *weights)
            leading[:] = query.shape[:2]
            for part, source, result in zip(PROJECTIONS, (query, key, value), projected, strict=True):
                watch.show(part, source, result)
            return projected

        return shown

    def project_out(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = F.linear(input, weight, bias)
        watch.show("out_proj", input.view(*leading, -1), result.view(*leading, -1))
        return result

    names = {
        **function.__globals__,
        # Else the modes would get the call once more, and run the real function instead of this copy.
        "has_torch_function": lambda _: False,
        **{name: project_in(name) for name in ATTENTION_PROJECTIONS},
        "linear": project_out,
    }
    shown = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    shown.__kwdefaults__ = function.__kwdefaults__
    return shown
