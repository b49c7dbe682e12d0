"""Record the layers' inputs and the gradient edges of their outputs, in the forward of a due step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.distributed.sharded_tensors import whole
from lightning_kfc.factors.sparse import dense
from lightning_kfc.layers import Adapter, Forward
from lightning_kfc.layers.forward import Probe
from lightning_kfc.monitoring.timing import StepTimes
from lightning_kfc.utilities.torch_internals import (
    DisableTorchFunction,
    base_of,
    is_wrapped,
    unseen_by_dispatch_modes,
    version_of,
)


@dataclass(frozen=True)
class KeptInputs:
    """A module's input, by reference: autograd keeps the input anyway, for the weight's gradient.

    Attributes:
        forward: The detached inputs, and an output on the meta device.
        versions: The versions of the input tensors in the forward.
    """

    forward: Forward
    versions: tuple[int, ...]

    @classmethod
    def of(cls, forward: Forward) -> KeptInputs:
        """Keep the inputs of a forward that runs now.

        A tensor that autocast will cast is copied: autograd keeps the cast tensor alone, and the original may change
        in place.
        """

        def keep(value: Any) -> Any:
            return _detached(value) if isinstance(value, Tensor) else value

        args, kwargs = tuple(map(keep, forward.args)), {name: keep(value) for name, value in forward.kwargs.items()}
        # A transposed convolution's output may be of several sizes.
        size = torch.empty_like(forward.output, device="meta") if isinstance(forward.output, Tensor) else None
        kept = Forward(args, kwargs, size)
        return cls(kept, _versions(kept))

    def read(self) -> Forward | None:
        """The inputs, or None if one was changed in place after the forward."""
        return self.forward if _versions(self.forward) == self.versions else None

    def numel(self) -> int:
        """The number of elements."""
        return sum(tensor.numel() for tensor in _tensors(self.forward))


def _detached(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    cast = (
        tensor.is_floating_point()
        and torch.is_autocast_enabled(device)
        and tensor.dtype != torch.get_autocast_dtype(device)
    )
    return tensor.detach().clone() if cast else tensor.detach()


def _tensors(forward: Forward) -> list[Tensor]:
    return [value for value in (*forward.args, *forward.kwargs.values()) if isinstance(value, Tensor)]


def _versions(forward: Forward) -> tuple[int, ...]:
    return tuple(version_of(tensor) for tensor in _tensors(forward))


@dataclass(frozen=True)
class Call:
    """One call of a layer's module in the forward.

    Attributes:
        layer: The layer's name.
        adapter: The adapter of the module that was called.
        record: The adapter's record of the forward.
        edge: The gradient edge of the module's own output.
        output_shape: The shape of that output.
        probe: Returns the input rows times the self-test's direction; None when no self-test is due.
        inputs: The module's input, if gradients of single examples are needed.
    """

    layer: str
    adapter: Adapter
    record: Any
    edge: GradientEdge
    output_shape: torch.Size
    probe: Probe | None
    inputs: KeptInputs | None = None

    def output_gradient(self, gradient: Tensor) -> Tensor:
        """The derivative that arrived at the edge, in the output's shape."""
        return dense(whole(gradient)).reshape(self.output_shape)


def output_edge(output: Tensor) -> GradientEdge:
    """The gradient edge of a module's output, which a later in-place operation does not disconnect.

    An in-place ReLU would move the tensor's ``grad_fn`` past itself, but leaves the edge. If the output is a view of
    all of its base (a Linear with bias on 3-D input), an in-place operation re-creates the view's node, and only the
    base's edge still receives a derivative.
    """
    base = base_of(output)
    if (
        base is not None
        and base.requires_grad
        and base.numel() == output.numel()
        and base.is_contiguous()
        and output.is_contiguous()
    ):
        return get_gradient_edge(base)
    return get_gradient_edge(output)


def parameter_call(layer: str, adapter: Adapter) -> Call:
    """The stand-in call of a loose parameter, whose edge is the parameter's own."""
    (parameter,) = adapter.own_parameters().values()
    return Call(layer, adapter, None, get_gradient_edge(parameter), parameter.shape, None)


def whole_forward(forward: Forward) -> Forward:
    """The whole inputs of a tensor-parallel module's forward, with the unchanged output."""
    tensors = [*forward.args, *forward.kwargs.values(), forward.output]
    if not any(map(is_sharded, tensors)):
        return forward
    kwargs = {name: whole(value) for name, value in forward.kwargs.items()}
    return Forward(tuple(map(whole, forward.args)), kwargs, forward.output)


class ForwardHook:
    """A forward hook whose copies, in a copied or pickled module, do nothing."""

    def __init__(self, record: Callable[[Forward, Tensor], None] | None) -> None:
        self._record = record

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record one call of the module."""
        if self._record is not None and isinstance(output, Tensor):
            self._record(Forward(args, kwargs, output), output)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        return ForwardHook(None)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[None]]:
        return ForwardHook, (None,)


@dataclass
class ForwardRecorder:
    """Records the calls of the modules that it is attached to.

    Attributes:
        calls: The calls recorded so far, in forward order.
        paused: Whether calls pass unrecorded, as those of checkpointed forwards that a backward re-runs.
        counted: The positions of the calls whose input rows have entered a statistic.
        times: Adds up the time that recording takes.
        failures: The error while a call was recorded, by layer; the user's forward continues.
        transformed: The layers with calls inside a ``torch.func`` transform, which have no rows.
    """

    calls: list[Call] = field(default_factory=list)
    paused: bool = False
    counted: set[int] = field(default_factory=set)
    times: StepTimes = field(default_factory=StepTimes)
    failures: dict[str, Exception] = field(default_factory=dict)
    transformed: set[str] = field(default_factory=set)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def attach(
        self,
        layer: str,
        adapters: Sequence[Adapter],
        direction: Callable[[], Tensor] | None,
        *,
        keep_inputs: bool = False,
    ) -> None:
        """Record the calls of a layer's modules.

        Args:
            layer: The layer's name.
            adapters: Its modules' adapters.
            direction: Returns the self-test's direction; None for no test.
            keep_inputs: Whether to keep the inputs themselves.
        """
        for adapter in adapters:

            def record(forward: Forward, output: Tensor, adapter: Adapter = adapter) -> None:
                try:
                    self._record(layer, adapter, forward, output, direction, keep_inputs)
                except Exception as error:
                    self.failures.setdefault(layer, error)

            self._handles.append(adapter.attach(ForwardHook(record)))

    def detach(self) -> None:
        """Remove every hook; calls already recorded stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record(
        self,
        layer: str,
        adapter: Adapter,
        forward: Forward,
        output: Tensor,
        direction: Callable[[], Tensor] | None,
        keep_inputs: bool,
    ) -> None:
        # Read at each call: a toggled optimizer freezes the other optimizers' parameters for a while.
        frozen = not adapter.own_parameters()
        if self.paused or frozen or not torch.is_grad_enabled():
            return
        if is_wrapped(output):
            self.transformed.add(layer)
            return
        if not output.requires_grad or output.is_nested:
            return
        with torch.no_grad():
            forward = whole_forward(forward)
        inputs = KeptInputs.of(forward) if keep_inputs else None
        part = self.times.phase("statistics")
        # Autocast would form the statistics in half precision; the loss recorder would inspect each operation.
        off = torch.autocast(output.device.type, enabled=False), DisableTorchFunction()
        with part, torch.no_grad(), off[0], off[1], unseen_by_dispatch_modes():
            recorded = adapter.record(forward)
            probe = None if direction is None else adapter.probe(forward, recorded, direction())
        self.calls.append(Call(layer, adapter, recorded, output_edge(output), output.shape, probe, inputs))
