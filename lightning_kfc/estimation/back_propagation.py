"""Back-propagation of seeds: from loss terms and recorded calls to the statistics of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_kfc.distributed.sharded_tensors import whole
from lightning_kfc.estimation.example_gradients import ExampleGradients
from lightning_kfc.estimation.graph import EdgeGradients, explained, loss_edge
from lightning_kfc.estimation.recording import Call
from lightning_kfc.estimation.seeds import Seeds
from lightning_kfc.estimation.self_test import SelfTest
from lightning_kfc.factors.sparse import dense
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.utilities.torch_internals import gradient_shape_and_type


def derivatives(seeds: Seeds, inputs: Sequence[GradientEdge]) -> list[Tensor | None]:
    """Back-propagate seeds to the inputs; None where they do not arrive."""
    outputs, values = _laid_out(seeds, 1.0)
    found = explained(torch.autograd.grad, outputs, inputs, values, retain_graph=True, allow_unused=True)
    return list(found)


def _laid_out(seeds: Seeds, scale: float) -> tuple[list[GradientEdge], list[Tensor]]:
    """The edges of seeds, and the scaled seeds in each edge's shape and precision."""
    values = []
    for edge, seed in seeds:
        shape, dtype = gradient_shape_and_type(edge)
        values.append((seed * scale).to(dtype).reshape(shape))
    return [edge for edge, _ in seeds], values


def reaches(loss: Tensor, calls: Sequence[Call]) -> bool:
    """Whether a loss depends on the output of any recorded call."""
    if not calls or not loss.requires_grad:
        return False
    edges = [call.edge for call in calls]
    found = torch.autograd.grad([loss_edge(loss)], edges, [torch.ones_like(loss)], retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


#: Called with a layer's name and an error.
OnFailure = Callable[[str, Exception], None]


def _raised(layer: str, error: Exception) -> None:
    raise error


def back_propagate(
    passes: Iterator[Seeds],
    calls: Sequence[Call],
    scale: float,
    test: SelfTest | None = None,
    examples: Mapping[str, ExampleGradients] | None = None,
    *,
    mean_fractions: Sequence[float] | None = None,
    on_failure: OnFailure = _raised,
    only_loose: bool = False,
) -> dict[int, Statistics]:
    """The statistics of every call that the seeds reach.

    Args:
        passes: From :func:`seed_passes`.
        calls: The recorded calls.
        scale: From :func:`seed_scale`; undone here.
        test: The self-test of the layers that wait for it, or None.
        examples: The collectors of single examples' gradients, by layer.
        mean_fractions: For each call, the loss's fraction of the optimizer step times the unit of the products, if the
            seeds are those of a whole loss that is a mean over examples; None for seeds of terms.
        on_failure: Called with the name of a layer whose statistics could not be formed, and with the error.
        only_loose: Whether to leave out the calls that have rows.

    Returns:
        Statistics by the position of the call.
    """
    wanted = [index for index, call in enumerate(calls) if not (only_loose and call.adapter.has_rows)]
    edges = [calls[index].edge for index in wanted]
    factors = _factors(calls, scale, mean_fractions)
    reached: dict[int, Statistics] = {}
    jointly: dict[str, list[tuple[int, Call, Tensor]]] = {}

    def take(position: int, gradient: Tensor) -> None:
        index = wanted[position]
        try:
            add(index, gradient)
        except Exception as error:
            on_failure(calls[index].layer, error)

    def add(index: int, gradient: Tensor) -> None:
        call, factor = calls[index], factors[index]
        arrived = call.output_gradient(gradient)
        with torch.no_grad():
            if test is not None:
                test.take(call, gradient)
            one = call.adapter.statistics(call.record, arrived)
            sums = {name: total * factor for name, total in one.sums.items()}
            if index in reached:
                sums = {name: total + reached[index].sums[name] for name, total in sums.items()}
            reached[index] = Statistics(one.means, sums, one.rows)
        if examples and call.layer in examples:
            jointly.setdefault(call.layer, []).append((index, call, arrived))

    edge_gradients: EdgeGradients | None = None
    for seeds in passes:
        extra = test.parameters() if test is not None else []
        if not edges and not extra:
            break
        outputs, values = _laid_out(seeds, scale)
        if edge_gradients is None:
            edge_gradients = EdgeGradients(outputs, edges)
        found = explained(edge_gradients.back_propagate, outputs, values, take, extra)
        if test is not None:
            test.check(calls, found)
        with torch.no_grad():
            for layer, parts in jointly.items():
                assert examples is not None
                parts.sort(key=lambda part: part[0])
                examples[layer].add([(call, arrived) for _, call, arrived in parts], factors[parts[0][0]])
        jointly.clear()
    return dict(sorted(reached.items()))


def added(first: Mapping[int, Statistics], second: Mapping[int, Statistics]) -> dict[int, Statistics]:
    """Add the output sums of two parts of a loss, by the position of the call; the parts share the input means."""
    total = dict(first)
    for index, entry in second.items():
        total[index] = total[index] + entry.without_means() if index in total else entry
    return dict(sorted(total.items()))


def gradient_norm(seeds: Seeds, calls: Sequence[Call]) -> float:
    """The norm of the seeds' derivatives at the outputs of all calls; no derivative is kept."""
    edges = [call.edge for call in calls]
    squares: list[float] = []

    def take(index: int, gradient: Tensor) -> None:
        squares.append(float(torch.linalg.vector_norm(dense(whole(gradient)).detach().double())) ** 2)

    if edges and seeds:
        outputs, values = _laid_out(seeds, 1.0)
        explained(EdgeGradients(outputs, edges).back_propagate, outputs, values, take)
    return math.sqrt(sum(squares))


def _factors(calls: Sequence[Call], scale: float, mean_fractions: Sequence[float] | None) -> list[float]:
    """The factor on products of two derivatives at each call's output."""
    if mean_fractions is None:
        return [1.0 / scale**2] * len(calls)
    pairs = zip(numbers_of_examples(calls), mean_fractions, strict=True)
    return [number / fraction / scale**2 for number, fraction in pairs]


def numbers_of_examples(calls: Sequence[Call]) -> list[int]:
    """The number of examples of each call, from its adapter; of a call without rows the largest, 1 without any."""
    found = [
        call.adapter.output_rows(torch.empty(call.output_shape, device="meta")).shape[0]
        if call.adapter.has_rows
        else None
        for call in calls
    ]
    largest = max((number for number in found if number is not None), default=1)
    return [largest if number is None else number for number in found]
