r"""The part of a loss's gradient without the recognised terms.

A loss :math:`h = \sum_t c_t h_t + u` has recognised terms :math:`h_t` and a rest u, such as a regulariser by hand or
a second head whose loss is not recognised. The rest's derivative is the loss's derivative minus that of the
recognised terms. Back-propagation is linear in its seeds, so one pass gives the rest's derivative: the seed is 1 at
the loss, and minus the term's derivative at the logits of each term.

The rest's empirical Fisher matrix is added to the curvature of the recognised terms. Products of different terms are
left out: their expectation is 0 for independent targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_kfc.estimation.graph import explained, loss_edge
from lightning_kfc.estimation.recording import Call
from lightning_kfc.estimation.seeds import Seeds, WeightedTerm
from lightning_kfc.utilities.autograd_graph import nodes_from
from lightning_kfc.utilities.torch_internals import gradient_shape_and_type

#: Operations on scalars whose result is a sum of the operands, each times a number.
ADDITIVE = (
    "Add",
    "Sub",
    "Neg",
    "Mul",
    "Div",
    "Sum",
    "Mean",
    "Stack",
    "Cat",
    "ToCopy",
    "View",
    "Squeeze",
    "Unsqueeze",
    "Reshape",
)

_Key = tuple[Node, int]


def _key(edge: GradientEdge) -> _Key:
    return edge.node, edge.output_nr


def _below(node: Node) -> Iterator[GradientEdge]:
    return (GradientEdge(child, number) for child, number in node.next_functions if child is not None)


class Rest:
    """The part of a loss without its recognised terms.

    Args:
        loss: The loss.
        terms: Its recognised terms.
        calls: The recorded calls, and the stand-ins of loose parameters.
        loss_scale: The factor that a gradient scaler has multiplied the loss by.
        differentiated: Whether the loss holds derivatives of the network, which depend on weights as a penalty does.
    """

    def __init__(
        self,
        loss: Tensor,
        terms: Sequence[WeightedTerm],
        calls: Sequence[Call],
        loss_scale: float,
        *,
        differentiated: bool = False,
    ) -> None:
        self._start = loss_edge(loss), torch.full_like(loss, 1.0 / loss_scale)
        self._terms = terms
        self._calls = calls
        layers = [call for call in calls if call.adapter.has_rows]
        weights = {get_gradient_edge(p).node for call in layers for p in call.adapter.own_parameters().values()}
        penalties = _penalties(self._start[0], {call.edge.node for call in layers}, weights)
        self._penalties = [] if differentiated else list(penalties)
        self._minus: Seeds | None = None

    def reaches(self, calls: Sequence[Call]) -> bool:
        """Whether the loss reaches a call's edge by a path that avoids the logits of recognised terms."""
        wanted = {call.edge.node for call in calls}
        inside: dict[_Key, set[_Key]] = {}
        for weighted in self._terms:
            if weighted.term.value_edge is not None:
                edges = {_key(edge) for edge, _ in weighted.term.edges}
                inside.setdefault(_key(weighted.term.value_edge), set()).update(edges)
        penalties = {_key(edge) for edge in self._penalties}
        pending: list[tuple[GradientEdge, _Key | None]] = [(self._start[0], None)]
        seen: set[tuple[Node, _Key | None]] = set()
        while pending:
            edge, within = pending.pop()
            key = _key(edge)
            if within is None and key in inside:
                within = key
            if key in penalties or (within is not None and key in inside[within]):
                continue
            if edge.node in wanted:
                return True
            if (edge.node, within) not in seen:
                seen.add((edge.node, within))
                pending += [(below, within) for below in _below(edge.node)]
        return False

    def uses_weights_of(self) -> set[str]:
        """The layers whose weights the loss reaches by a path that avoids the outputs of recorded calls.

        A loss that holds derivatives of the network has such paths: derivatives depend on the weights directly.
        """
        layers = [call for call in self._calls if call.adapter.has_rows]
        owners = {
            get_gradient_edge(p).node: call.layer for call in layers for p in call.adapter.own_parameters().values()
        }
        outputs = {call.edge.node for call in layers}
        return {owners[node] for node in nodes_from(self._start[0].node, until=outputs) if node in owners}

    def seeds(self) -> Seeds:
        """The seeds whose back-propagation is the rest's derivative."""
        if self._minus is None:
            parts = [self._derivatives([self._start], self._penalties), *(seeds for _, seeds in self.of_functions())]
            self._minus = [(edge, -gradient) for part in parts for edge, gradient in part]
        return [self._start, *self._minus]

    def of_functions(self) -> Iterator[tuple[str, Seeds]]:
        """The derivative of each recognised loss function at its logits."""
        calls: dict[_Key, list[WeightedTerm]] = {}
        for weighted in self._terms:
            if weighted.term.value_edge is not None:
                calls.setdefault(_key(weighted.term.value_edge), []).append(weighted)
        for terms in calls.values():
            first = terms[0]
            assert first.term.value_edge is not None
            edges = {_key(edge): edge for weighted in terms for edge, _ in weighted.term.edges}
            found = self._derivatives([(first.term.value_edge, first.derivative)], list(edges.values()))
            yield first.term.function, found

    @staticmethod
    def _derivatives(seeds: Seeds, edges: Sequence[GradientEdge]) -> Seeds:
        if not edges:
            return []
        starts, values = [edge for edge, _ in seeds], [value for _, value in seeds]
        found = explained(torch.autograd.grad, starts, edges, values, retain_graph=True, allow_unused=True)
        return [(edge, gradient) for edge, gradient in zip(edges, found, strict=True) if gradient is not None]


def _penalties(start: GradientEdge, outputs: Set[Node], weights: Set[Node]) -> Iterator[GradientEdge]:
    """The terms of a sum that depend on layers' parameters alone, such as a weight penalty by hand.

    At the parameters such a term would look like a use of the weights outside their layers.
    """
    pending, seen = [start], {start.node}
    while pending:
        node = pending.pop().node
        below = list(_below(node))
        if not node.name().startswith(ADDITIVE) or (node.name().startswith(("Mul", "Div")) and len(below) > 1):
            continue
        for edge in below:
            if edge.node in seen or len(gradient_shape_and_type(edge)[0]) > 1:
                continue
            seen.add(edge.node)
            found = set()
            for node in nodes_from(edge.node):
                found.add(node)
                if node in outputs:
                    pending.append(edge)
                    break
            else:
                if not weights.isdisjoint(found):
                    yield edge
