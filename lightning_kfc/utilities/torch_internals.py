"""All private names of torch that the package uses, and that of Lightning Fabric."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]  # private
from torch.autograd.graph import GradientEdge
from torch.distributions import Beta, MultivariateNormal
from torch.nn import _reduction
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["AnyBatchNorm", "DisableTorchFunction", "TorchDispatchMode", "fused_recurrence"]

#: The base class of all batch norms.
AnyBatchNorm = _BatchNorm
#: Keeps torch function modes and subclasses of Tensor from seeing the operations within.
DisableTorchFunction = torch._C.DisableTorchFunction
#: The functions that recurrent modules call.
fused_recurrence: Any = _VF
#: The functions by which ``multi_head_attention_forward`` projects its inputs: packed weights, and separate ones.
ATTENTION_PROJECTIONS = ("_in_projection_packed", "_in_projection")
#: Operators of torch.distributed.
COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")

# Modules.


def parameters_of(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """A module's own parameters by name; None for an absent one."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name, to read and to replace."""
    return module._buffers


def has_packed_projections(module: nn.MultiheadAttention) -> bool:
    """Whether the weights of query, key and value are one parameter."""
    return bool(module._qkv_same_embed_dim)


def dimensions_of_one_example(module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) -> int:
    """The number of dimensions of an input without a batch."""
    return int(module._get_no_batch_dim())


def plain_name(name: str) -> str:
    """A module's name without the prefix of compiled modules."""
    return name.replace("_orig_mod.", "")


# Tensors.


def version_of(tensor: Tensor) -> int:
    """A tensor's number of in-place writes."""
    # A tensor of inference mode has no version, and cannot be changed outside it.
    return 0 if tensor.is_inference() else tensor._version


def version_kept(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Restore a tensor's version at the end of the context."""
    kept: contextlib.AbstractContextManager[None] = _unsafe_preserve_version_counter(tensor)
    return kept


def base_of(view: Tensor) -> Tensor | None:
    """The base of a view; None for other tensors."""
    return view._base


def values_of(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor, which need not be coalesced; the tensor itself if it is dense."""
    return tensor._values() if tensor.is_sparse else tensor


def negated_view(tensor: Tensor) -> Tensor:
    """A lazily negated view."""
    return torch._neg_view(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a ``torch.func`` transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def hooks_of(tensor: Tensor) -> Any:
    """A tensor's backward hooks; a false value if there are none."""
    return tensor._backward_hooks


def set_hooks(tensor: Tensor, hooks: Any) -> None:
    """Replace a tensor's backward hooks."""
    tensor._backward_hooks = hooks


def interpolate(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors in place by a share of the way to others."""
    torch._foreach_lerp_(tensors, ends, weight)


def norms(tensors: list[Tensor], order: float) -> list[float]:
    """The norms of tensors, by one read of their device."""
    found = torch._foreach_norm(tensors, order)
    return torch.stack([norm.to(found[0].device) for norm in found]).tolist()


def scale(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors in place."""
    torch._foreach_mul_(tensors, factor)


def add(tensors: list[Tensor], others: list[Tensor], factor: float) -> None:
    """Add multiples of others to tensors in place."""
    torch._foreach_add_(tensors, others, alpha=factor)


# Storages.


def address_of(storage: torch.UntypedStorage) -> int:
    """The identity of a storage while it or a weak reference to it exists."""
    return int(storage._cdata)


def weak_reference(storage: torch.UntypedStorage) -> Any:
    """A reference that keeps a storage's address, but not its memory, until :func:`free`."""
    return storage._weak_ref()


def free(reference: Any) -> None:
    """Free a weak reference to a storage."""
    torch.UntypedStorage._free_weak_ref(reference)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


# Autograd.


def gradient_shape_and_type(edge: GradientEdge) -> tuple[torch.Size, torch.dtype]:
    """The shape and the type of the gradient that an edge takes."""
    metadata = edge.node._input_metadata[edge.output_nr]
    return torch.Size(metadata.shape), metadata.dtype


def custom_function(node: Any) -> type | None:
    """The class of the custom autograd function that a node runs, or None."""
    function: type | None = getattr(type(node), "_forward_cls", None)
    return function


def saved_moments(node: Any) -> tuple[Tensor, Tensor]:
    """The batch's mean and inverse deviation that a batch norm's node has saved."""
    return node._saved_result1, node._saved_result2


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The innermost saved-tensor hooks that are in force, or None."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def unseen_by_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Hide the operations inside the context from torch dispatch modes."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return contextlib.nullcontext()
    return _disable_current_modes()


# DistributedDataParallel.


def is_sink(node: Any) -> bool:
    """Whether a node is the sink of ``static_graph=True``, on the output of the first forward."""
    return bool(node.name() == "_DDPSinkBackward")


def sink_waits(ddp: Any) -> bool:
    """Whether the sink's backward starts no reduction."""
    return bool(getattr(ddp, "_static_graph_delay_allreduce_enqueued", True))


def set_sink_waits(ddp: Any, waits: bool) -> None:
    """Set whether the sink's backward starts no reduction."""
    ddp._static_graph_delay_allreduce_enqueued = waits


# Operators, losses and distributions.


def schema_of(function: Any) -> Any:
    """The schema of an operator; None for higher-order operators."""
    return function._schema if isinstance(function, torch._ops.OpOverload) else None


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction by two deprecated arguments of loss functions."""
    return str(_reduction.legacy_get_string(size_average, reduce, emit_warning=False))


def scale_tril_of(distribution: MultivariateNormal) -> Tensor:
    """The Cholesky factor of the covariance, in its given shape."""
    return distribution._unbroadcasted_scale_tril


def concentrations_of(distribution: Beta) -> Tensor:
    """Both concentrations, along the last axis."""
    concentrations: Tensor = distribution._dirichlet.concentration
    return concentrations


# Optimizers and schedulers.


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer divides its gradients by the loss scale in its step, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def inner_schedulers(scheduler: Any) -> Sequence[Any]:
    """The inner schedulers of a scheduler."""
    found: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    return found


def custom_scale(scheduler: Any) -> Any:
    """The user's own function of a cyclic scheduler, or None."""
    return getattr(scheduler, "_scale_fn_custom", None)


def mark_as_stepped(optimizer: Any) -> None:
    """Keep schedulers from warning that they step before an optimizer, whose step must take attributes."""
    optimizer._opt_called = True
    optimizer.step._wrapped_by_lr_sched = True


# Lightning Fabric, if it is imported.


def set_fabric_backward(under_way: bool) -> bool:
    """Set whether Fabric's hooks on outputs take a back-propagation for that of ``fabric.backward``.

    Returns:
        The former value.
    """
    before = False
    for package in ("lightning.fabric", "lightning_fabric"):
        module: Any = sys.modules.get(f"{package}.wrappers")
        if module is not None:
            before = before or bool(getattr(module, "_in_fabric_backward", False))
            module._in_fabric_backward = under_way
    return before
