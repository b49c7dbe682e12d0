"""Custom autograd functions whose backward clears or overwrites their saved tensors.

A second backward through such a function fails, or gives another gradient. The estimator's back-propagations come
before the user's backward, so the function's state is restored after each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.estimation.graph import loss_edge
from lightning_kfc.utilities.autograd_graph import nodes_from
from lightning_kfc.utilities.torch_internals import custom_function, version_kept, version_of


class CustomFunctions:
    """The custom autograd functions in the graph of a loss.

    Attributes:
        used_up: The names of functions whose backward has changed their state.
        failed: The name of the function whose backward has raised, or None.
    """

    def __init__(self) -> None:
        self.used_up: set[str] = set()
        self.failed: str | None = None

    @contextlib.contextmanager
    def kept(self, loss: Tensor) -> Iterator[None]:
        """Restore, after each back-propagation, the state of the custom functions in a loss's graph."""
        self.failed = None
        contexts = [_Context(node, function) for node, function in _custom_nodes(loss)]
        with contextlib.ExitStack() as handles:
            for context in contexts:
                for handle in (
                    context.node.register_prehook(context.save),
                    context.node.register_hook(context.restore),
                ):
                    handles.callback(handle.remove)
            try:
                yield
            finally:
                for context in contexts:
                    if context.running:
                        self.failed = context.name
                        context.restore()
                self.used_up |= {context.name for context in contexts if context.changed}


class _Context:
    """The state of one call of a custom function: attributes, and saved tensors."""

    def __init__(self, node: Any, function: type) -> None:
        self.node = node
        self.name: str = function.__name__
        self.changed = False
        self.running = False
        self._attributes: dict[str, Any] = {}
        self._tensors: list[tuple[Tensor, int, int, Tensor]] = []
        self._versions = contextlib.ExitStack()

    @torch.no_grad()
    def save(self, *_: Any) -> None:
        """Save the state before the backward."""
        self._attributes = dict(vars(self.node))
        try:
            saved = list(self.node.saved_tensors)
        except RuntimeError:
            # Changed in place since the forward: the backward raises its own error.
            saved = []
        held = [value for value in (*saved, *self._attributes.values()) if isinstance(value, Tensor)]
        for tensor in {id(tensor): tensor for tensor in held}.values():
            size = tensor.untyped_storage().nbytes()
            self._tensors.append((tensor, version_of(tensor), size, tensor.detach().clone()))
            self._versions.enter_context(version_kept(tensor))
        self.node.maybe_clear_saved_tensors = self._note_change
        self.running = True

    def _note_change(self) -> None:
        self.changed = True

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        """Restore the state after the backward."""
        self.running = False
        del self.node.maybe_clear_saved_tensors
        now = vars(self.node)
        if now.keys() != self._attributes.keys() or any(now[name] is not old for name, old in self._attributes.items()):
            self.changed = True
            now.clear()
            now.update(self._attributes)
        for tensor, version, size, values in self._tensors:
            storage = tensor.untyped_storage()
            if version_of(tensor) != version or storage.nbytes() != size:
                self.changed = True
                storage.resize_(size)
                tensor.detach().copy_(values)
        self._tensors.clear()
        self._versions.close()


def _custom_nodes(loss: Tensor) -> list[tuple[Any, type]]:
    """The nodes of custom functions in a loss's graph, each with its function, without torch's own."""
    found = ((node, custom_function(node)) for node in nodes_from(loss_edge(loss).node))
    return [(node, own) for node, own in found if own is not None and not own.__module__.startswith("torch.")]
