"""Contexts that keep what a due step does from showing in the user's model, compiler and random streams."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eager_compiled_code() -> Iterator[None]:
    """Run compiled code eagerly, so that hooks fire and the loss is seen; what is compiled stays compiled."""
    if "torch._dynamo" not in sys.modules:
        # Nothing can have been compiled, and importing the compiler would cost seconds.
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def model_state_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers (batch norm's running statistics) and random streams back as they were.

    Under activation checkpointing a back-propagation runs forwards again, which update and draw once more.
    """
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with _random_streams_kept(model):
            yield
    finally:
        for module, name, buffer, value in kept:
            # Through .data: the graph may hold the buffer, and its backward must not take it for changed.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextlib.contextmanager
def _random_streams_kept(model: nn.Module) -> Iterator[None]:
    """Leave the random streams of torch, Python and NumPy as they were."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    numpy_random = sys.modules.get("numpy.random")
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
