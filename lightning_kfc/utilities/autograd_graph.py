"""Walks over autograd graphs."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch.autograd.graph import Node


def nodes_from(start: Node, until: Container[Node] = ()) -> Iterator[Node]:
    """The nodes of a graph from ``start`` on, each once; nodes below those in ``until`` are left out.

    Args:
        start: The node at which the walk starts, and which it always passes.
        until: The nodes at which the walk turns back.
    """
    pending, seen = [start], {start}
    while pending:
        node = pending.pop()
        yield node
        if node in until and node is not start:
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                pending.append(below)
