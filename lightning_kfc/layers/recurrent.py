"""LSTM, GRU and RNN, as cells and over sequences: the products of all gates with input, and with state, are layers.

The forward is one fused function, which exposes no product. On due steps the same recurrence runs step by step, with
separate linear products; its results agree up to rounding. Rows are all examples at all steps.

Under non-reentrant activation checkpointing the fused function runs unrecorded: both of its forwards must save the
same tensors, and only the first belongs to the due step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import ForwardHook
from lightning_kfc.layers.fused_modules import Watch
from lightning_kfc.layers.linear import LinearAdapter
from lightning_kfc.layers.options import AdapterOptions
from lightning_kfc.layers.recurrent_cells import CELLS, SEQUENCES, one_step, packed, padded, suffix
from lightning_kfc.layers.registry import register_adapter
from lightning_kfc.utilities.torch_internals import parameters_of, saved_tensor_hooks


@register_adapter(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class GateAdapter(LinearAdapter):
    """One product of a recurrent module, of all its gates together.

    Each step is a row for any ``weight_sharing``, since the number of steps is known only after the last step.

    Args:
        module: The recurrent module.
        options: See :class:`Adapter`.
        watch: Calls hooks with its products.
        part: ``"ih"`` (input), ``"hh"`` (state) or ``"hr"`` (an LSTM's projection), with layer and direction.
    """

    kind = "Recurrent"
    #: In a packed batch, the examples differ from step to step.
    pairs_rows: ClassVar[bool] = False
    unseen: ClassVar[str] = "its products are not seen inside an activation checkpoint, or it is never called"
    module: nn.RNNBase | nn.RNNCellBase

    def __init__(self, module: nn.RNNBase | nn.RNNCellBase, options: AdapterOptions, watch: Watch, part: str) -> None:
        # The batch is the second axis for any ``batch_first``.
        super().__init__(module, replace(options, batch_axis=1, weight_sharing="expand"))
        self._watch, self._part = watch, part

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse weights that are computed from other parameters."""
        names = (f"weight_{part}" for part in _part_names(module))
        return None if all(name in parameters_of(module) for name in names) else "its weight is re-parametrised"

    @classmethod
    def sublayers(cls, module: nn.Module, options: AdapterOptions) -> dict[str, Adapter]:
        """One adapter per product."""
        assert isinstance(module, nn.RNNBase | nn.RNNCellBase)
        watch = Watch(module, _run)
        return {part: cls(module, options, watch, part) for part in _part_names(module)}

    def attach(self, hook: ForwardHook) -> RemovableHandle:
        """See :class:`Adapter`."""
        return self._watch.attach(self._part, hook)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The product's weight and bias."""
        found = {role: parameters_of(self.module).get(f"{role}_{self._part}") for role in ("weight", "bias")}
        return {role: parameter for role, parameter in found.items() if parameter is not None}


def _part_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.RNNCellBase):
        return ["ih", "hh"]
    assert isinstance(module, nn.RNNBase)
    products = ["ih", "hh", *(["hr"] if module.proj_size else [])]
    ends = [suffix(layer, d) for layer in range(module.num_layers) for d in range(1 + module.bidirectional)]
    return [f"{product}_{end}" for end in ends for product in products]


def _run(watch: Watch, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if _inside_checkpoint():
        return forward(*args, **kwargs)
    with _ShownRecurrence(watch):
        return forward(*args, **kwargs)


def _inside_checkpoint() -> bool:
    hooks = saved_tensor_hooks()
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


class _ShownRecurrence(TorchFunctionMode):
    """Stands in for the fused function that a recurrent module calls."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the recurrence step by step; pass other functions on."""
        if func in CELLS:
            return _as_fused(func, args, one_step(self._watch, CELLS[func], *args))
        if func in SEQUENCES:
            run = packed if isinstance(args[3], list) else padded
            return _as_fused(func, args, run(self._watch, SEQUENCES[func], *args))
        return func(*args, **(kwargs or {}))


def _as_fused(function: Any, args: tuple[Any, ...], results: Any) -> Any:
    """The results in the fused function's precision, for which autocast has special rules."""
    if not torch.is_autocast_enabled(args[0].device.type):
        return results
    options = list(args)
    if function in SEQUENCES:
        options[7 if isinstance(args[3], list) else 6] = False  # no training mode, so that dropout draws no numbers
    with torch.no_grad():
        fused = function(*options)
    if isinstance(results, Tensor):
        return results.to(fused.dtype)
    return tuple(result.to(like.dtype) for result, like in zip(results, fused, strict=True))
