"""Edges of the autograd graph, and back-propagation that keeps no derivative in memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_kfc.utilities.autograd_graph import nodes_from
from lightning_kfc.utilities.torch_internals import is_sink

#: The error message by a part of torch's message, for graphs that cannot be differentiated again.
UNDIFFERENTIABLE = {
    "backward through the graph a second time": (
        "KFC needs the graph of the loss, but a backward has freed it. Call update(loss) before loss.backward()."
    ),
    "use_reentrant": (
        "KFC cannot differentiate through reentrant activation checkpointing. "
        "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
    ),
}


def explained(differentiate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that differentiates, with a clearer error for graphs that do not allow it."""
    try:
        return differentiate(*arguments, **options)
    except RuntimeError as error:
        for message, way_out in UNDIFFERENTIABLE.items():
            if message in str(error):
                raise RuntimeError(way_out) from error
        raise


def loss_edge(loss: Tensor) -> GradientEdge:
    """The gradient edge of a loss, below the sink of DistributedDataParallel's static graphs.

    The sink would count the estimator's back-propagation as a backward.
    """
    if not loss.requires_grad:
        raise ValueError("The loss has no gradient. Compute it with gradients enabled, and do not detach it.")
    edge = get_gradient_edge(loss)
    while is_sink(edge.node):
        below = edge.node.next_functions[edge.output_nr]
        assert below[0] is not None
        edge = GradientEdge(below[0], below[1])
    return edge


def refuse_reentrant_checkpointing(loss: Tensor) -> None:
    """Check that a loss's graph holds no reentrant activation checkpointing.

    Raises:
        RuntimeError: If it does: such a region has no graph before the backward, so its layers are not recorded.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes_from(loss_edge(loss).node)):
        raise RuntimeError(
            "KFC does not work with torch.utils.checkpoint(..., use_reentrant=True), whose regions have no graph "
            "before the backward. Pass use_reentrant=False; the gradients are the same."
        )


def uses(start: Node, nodes: Collection[Node]) -> Counter[Node]:
    """The number of edges that lead to each of the nodes from those of a graph.

    Args:
        start: The node at which the graph begins.
        nodes: The nodes that count, such as the parameters'.
    """
    above = (node for node in nodes_from(start, until=nodes) if node is start or node not in nodes)
    return Counter(below for node in above for below, _ in node.next_functions if below is not None and below in nodes)


#: Called with the position of an edge and the derivative there.
Receive = Callable[[int, Tensor], None]


class EdgeGradients:
    """The edges at which derivatives are wanted.

    Args:
        starts: The possible starts of back-propagation.
        edges: The edges of the wanted derivatives.
    """

    def __init__(self, starts: Sequence[GradientEdge], edges: Sequence[GradientEdge]) -> None:
        self._edges = edges
        self._positions: dict[Node, list[int]] = {}
        for position, edge in enumerate(edges):
            self._positions.setdefault(edge.node, []).append(position)
        above = _nodes_above(starts, self._positions)
        self._watched = [node for node in self._positions if node in above]
        self._lowest = [i for node, positions in self._positions.items() if node not in above for i in positions]

    def back_propagate(
        self,
        outputs: Sequence[GradientEdge],
        values: Sequence[Tensor],
        receive: Receive,
        others: Sequence[GradientEdge] = (),
    ) -> list[Tensor | None]:
        """Back-propagate once; the graph is kept.

        Args:
            outputs: The starts.
            values: The derivatives at the starts.
            receive: Called with each derivative, in the order of arrival.
            others: Edges whose derivatives are returned instead; None where no derivative arrived.
        """
        inputs = [self._edges[position] for position in self._lowest] + list(others)
        if not inputs:
            return []
        with contextlib.ExitStack() as handles:
            for node in self._watched:
                handle = node.register_prehook(partial(self._arrived, receive, self._positions[node]))
                handles.callback(handle.remove)
            found = torch.autograd.grad(outputs, inputs, values, retain_graph=True, allow_unused=True)
        for position, gradient in zip(self._lowest, found, strict=False):
            if gradient is not None:
                receive(position, gradient)
        return list(found[len(self._lowest) :])

    def _arrived(self, receive: Receive, positions: Sequence[int], gradients: tuple[Any, ...]) -> None:
        for position in positions:
            gradient = gradients[self._edges[position].output_nr]
            if gradient is not None:
                receive(position, gradient)


def _nodes_above(starts: Sequence[GradientEdge], wanted: dict[Node, list[int]]) -> set[Node]:
    """The nodes above another wanted node: back-propagation to the lowest wanted nodes passes through them."""
    below: dict[Node, bool] = {}
    pending = [edge.node for edge in starts]
    while pending:
        node = pending[-1]
        if node in below:
            pending.pop()
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        unknown = [child for child in children if child not in below]
        if unknown:
            pending += unknown
            continue
        below[node] = any(below[child] or child in wanted for child in children)
        pending.pop()
    return {node for node, has in below.items() if has}
