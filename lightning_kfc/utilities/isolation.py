"""Contexts that isolate a due step from the user's model, compiler and random streams."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_kfc.utilities.autograd_graph import nodes_from
from lightning_kfc.utilities.torch_internals import (
    buffers_of,
    hooks_of,
    is_sink,
    set_fabric_backward,
    set_hooks,
    set_sink_waits,
    sink_waits,
)


class _EagerStance:
    """The compiler's stance during due steps, shared by all engines.

    The stance belongs to the process, and the backwards of two callbacks in one trainer are not nested: A begins, B
    begins, A ends, B ends. If each restored the stance at its beginning, B would restore A's ``force_eager``.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._stance = contextlib.ExitStack()

    def enter(self) -> None:
        if self._inside == 0:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._stance.close()


_EAGER_STANCE = _EagerStance()


@contextlib.contextmanager
def eager_compiled_code() -> Iterator[None]:
    """Run compiled code eagerly, so that hooks and the recording of losses work; nothing is compiled again."""
    if "torch._dynamo" not in sys.modules:
        # No code is compiled, and the import of the compiler would take seconds.
        yield
        return
    _EAGER_STANCE.enter()
    try:
        yield
    finally:
        _EAGER_STANCE.leave()


def full_precision(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Disable autocast, in which a plain loop would form factors and updates in half precision."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Protect buffers, random streams and hooks on parameters from an extra back-propagation.

    Under activation checkpointing, the back-propagation runs forwards again, which update buffers and draw random
    numbers. Fabric takes it for its own.
    """
    with _buffers_kept(model), _random_streams_kept(model), _parameter_hooks_set_aside(model), _as_by_fabric():
        yield


@contextlib.contextmanager
def sinks_at_rest(loss: Tensor) -> Iterator[None]:
    """Keep DistributedDataParallel from counting an extra back-propagation as its own.

    With ``static_graph=True`` the output of the first forward has a node whose backward starts the reduction of all
    gradients. After an extra pass through this node, the real backward would not reduce, and the ranks would silently
    diverge.
    """
    if not (dist.is_available() and dist.is_initialized()) or loss.grad_fn is None:
        yield
        return
    # DDP's own node has a weak reference to its module.
    modules = [node.ddp_weakref() for node in nodes_from(loss.grad_fn) if is_sink(node)]  # type: ignore[attr-defined]
    at_work = [ddp for ddp in modules if ddp is not None and not sink_waits(ddp)]
    try:
        for ddp in at_work:
            set_sink_waits(ddp, True)
        yield
    finally:
        for ddp in at_work:
            set_sink_waits(ddp, False)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers (batch norm's running statistics) of modules in training mode."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in buffers_of(module).items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            # .data leaves the version unchanged, which the backward checks if the graph holds the buffer.
            buffer.data.copy_(value)
            buffers_of(module)[name] = buffer


def random_state(device: torch.device) -> Tensor:
    """The state of a device's default generator."""
    state: Tensor = torch.get_rng_state() if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of a device's default generator."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


@contextlib.contextmanager
def random_states_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the default generators of devices."""
    states = {device: random_state(device) for device in devices}
    try:
        yield
    finally:
        for device, state in states.items():
            set_random_state(device, state)


@contextlib.contextmanager
def _random_streams_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random streams of torch, Python and NumPy."""
    devices = {torch.device("cpu"), *(p.device for p in model.parameters() if p.device.type != "meta")}
    numpy_random = sys.modules.get("numpy.random")
    python_state, numpy_state = random.getstate(), None if numpy_random is None else numpy_random.get_state()
    try:
        with random_states_kept(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@contextlib.contextmanager
def _as_by_fabric() -> Iterator[None]:
    """Let Fabric's hooks on outputs pass, which in mixed precision refuse what ``fabric.backward`` did not begin."""
    before = set_fabric_backward(True)
    try:
        yield
    finally:
        set_fabric_backward(before)


@contextlib.contextmanager
def _parameter_hooks_set_aside(model: nn.Module) -> Iterator[None]:
    """Disable hooks on parameters, which belong to the loss's gradient alone."""
    kept = [(parameter, hooks_of(parameter)) for parameter in model.parameters() if hooks_of(parameter)]
    for parameter, _ in kept:
        set_hooks(parameter, None)
    try:
        yield
    finally:
        for parameter, hooks in kept:
            set_hooks(parameter, hooks)
