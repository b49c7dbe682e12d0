"""Back-propagation of seeds: from loss terms and recorded calls to the statistics of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_kfc.estimation.example_gradients import ExampleGradients
from lightning_kfc.estimation.graph import Arrivals
from lightning_kfc.estimation.recording import Call
from lightning_kfc.estimation.self_test import SelfTest
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.losses.terms import LossTerm

Seeds = list[tuple[GradientEdge, Tensor]]


#: What torch says where the graph cannot be differentiated once more, and the way out.
UNDIFFERENTIABLE = {
    "backward through the graph a second time": (
        "KFC needs the graph of the loss, which a backward has freed: call update(loss) before loss.backward()."
    ),
    "use_reentrant": (
        "KFC cannot differentiate through activation checkpointing of the reentrant kind: "
        "pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
    ),
}


def _explained(differentiate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what differentiates; where the graph does not allow it, say why and what to do."""
    try:
        return differentiate(*arguments, **options)
    except RuntimeError as error:
        for said, way_out in UNDIFFERENTIABLE.items():
            if said in str(error):
                raise RuntimeError(way_out) from error
        raise


def loss_edge(loss: Tensor) -> GradientEdge:
    """The gradient edge of a loss, below the sink that DistributedDataParallel puts on top of a static graph.

    Differentiating through the sink would make it count a backward that the other ranks may not make.
    """
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient: it was computed without one, or detached.")
    edge = get_gradient_edge(loss)
    while edge.node.name() == "_DDPSinkBackward":
        below = edge.node.next_functions[edge.output_nr]
        assert below[0] is not None
        edge = GradientEdge(below[0], below[1])
    return edge


@dataclass(frozen=True)
class WeightedTerm:
    """A loss term that the loss really contains, with the weights c of its terms."""

    term: LossTerm
    weights: Tensor
    derivative: Tensor

    def is_finite(self) -> bool:
        """Whether logits and weights are finite, so that targets can be drawn and seeds made.

        Minus infinity rules a class out, which is no fault while another one is left.
        """
        logits = self.term.logits
        if self.term.likelihood.vector_valued and logits.numel():
            logits = logits.amax(-1)
        return bool(torch.isfinite(logits).all() and torch.isfinite(self.weights).all())


def refuse_reentrant_checkpointing(loss: Tensor) -> None:
    """Look for reentrant activation checkpointing in a loss's graph.

    Raises:
        RuntimeError: If there is any: such a region has no graph before backward, so its layers are not seen.
    """
    pending, seen = [loss_edge(loss).node], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "KFC does not work with torch.utils.checkpoint(..., use_reentrant=True): the region has no graph "
                "before backward, so its layers cannot be seen. Pass use_reentrant=False: the gradients are the same."
            )
        pending += [below for below, _ in node.next_functions if below is not None]


def weighted_terms(
    loss: Tensor, terms: Sequence[LossTerm], *, loss_scale: float = 1.0, loss_fraction: float = 1.0
) -> list[WeightedTerm]:
    """Keep the recorded loss terms that the loss contains, with their weights.

    A loss function also called for a metric is recorded too; the loss has no derivative with respect to it.

    Args:
        loss: The loss of this backward.
        terms: What was recorded while it was computed.
        loss_scale: The factor that a gradient scaler multiplied the loss by.
        loss_fraction: The share of this backward in the optimizer step (1/k when k micro-batches are
            accumulated), for terms whose weight cannot be asked of the loss.
    """
    edges = [term.value_edge for term in terms if term.value_edge is not None]
    derivatives: Iterator[Tensor | None] = iter(())
    if edges:
        start = torch.full_like(loss, 1.0 / loss_scale)
        found = _explained(torch.autograd.grad, [loss_edge(loss)], edges, [start], retain_graph=True, allow_unused=True)
        derivatives = iter(found)
    kept = []
    for term in terms:
        derivative = term.logits.new_tensor(loss_fraction) if term.value_edge is None else next(derivatives)
        if derivative is not None:
            kept.append(WeightedTerm(term, term.term_weights(derivative), derivative))
    return kept


#: What rounding, in half precision too, may leave of a difference, as a share of the loss.
ROUNDING = 0.01


def never_negative(loss: Tensor, terms: Sequence[WeightedTerm], loss_scale: float) -> bool:
    """Whether a loss is seen to have no less than 0 in it: recognised terms, none subtracted, and nothing below 0.

    Args:
        loss: The loss.
        terms: All terms that it contains, as far as they are recognised.
        loss_scale: The factor that a gradient scaler has multiplied it by.
    """
    total = loss.new_zeros((), dtype=torch.float64)
    for weighted in terms:
        value = weighted.term.value
        if value is None or bool((weighted.derivative < 0).any()) or bool((value < 0).any()):
            return False
        total += torch.sum(weighted.derivative.double() * value.double())
    whole = loss.detach().double() / loss_scale
    return bool(terms) and bool(whole - total >= -ROUNDING * whole.abs())


def all_zero(terms: Sequence[WeightedTerm]) -> bool:
    """Whether terms are there, and each is multiplied by 0; a batch without examples is another matter."""
    weights = [weighted.weights for weighted in terms if weighted.weights.numel()]
    return bool(weights) and not any(bool(own.any()) for own in weights)


def seed_scale(terms: Sequence[WeightedTerm]) -> float:
    """A power of two that brings the largest seeds near 1, so that they do not underflow in half precision."""
    largest = max((float(w.weights.max()) for w in terms if w.weights.numel()), default=0.0)
    if not (largest > 0 and math.isfinite(largest)):
        return 1.0
    return float(2.0 ** -round(math.log2(largest) / 2))


def edges_with_seed(term: LossTerm, seed: Tensor) -> Seeds:
    """A seed shaped as the logits, where it enters the graph."""
    laid_out = term.layout(seed)
    return [(edge, laid_out if sign > 0 else -laid_out) for edge, sign in term.edges]


def seed_passes(terms: Sequence[WeightedTerm], fisher: str, generator: torch.Generator) -> Iterator[Seeds]:
    """The seeds of each back-propagation, whose G's are added up.

    Args:
        terms: The loss terms.
        fisher: ``"mc"`` (one pass), ``"exact"`` (one a position and outcome) or ``"empirical"`` (one pass).
        generator: The source of randomness.
    """
    if fisher == "exact":
        for weighted in terms:
            for seed in weighted.term.likelihood.exact_seeds(weighted.term.logits, weighted.weights, generator):
                yield edges_with_seed(weighted.term, seed)
        return
    together: Seeds = []
    for weighted in terms:
        if fisher == "empirical":
            together += _empirical_seed(weighted, generator)
        else:
            seed = weighted.term.likelihood.sampled_seed(weighted.term.logits, weighted.weights, generator)
            together += edges_with_seed(weighted.term, seed)
    yield together


def unusable_seeds(terms: Sequence[WeightedTerm], fisher: str, generator: torch.Generator) -> Iterator[Seeds]:
    """NaN seeds, for logits or weights that are not finite: every layer's statistics say so, too.

    As many passes as there would be: ranks whose layers talk to each other in a backward must make the same number.
    """
    if fisher == "exact":
        for seeds in seed_passes(terms, fisher, generator):
            yield [(edge, torch.full_like(seed, math.nan)) for edge, seed in seeds]
        return
    yield [pair for w in terms for pair in edges_with_seed(w.term, torch.full_like(w.term.logits, math.nan))]


def _empirical_seed(weighted: WeightedTerm, generator: torch.Generator) -> Seeds:
    r"""Seeds :math:`\pm\sqrt{c}\,\nabla_z\ell(z, y)` with the data's y, from :math:`c\,\nabla_z\ell` of autograd.

    Random signs let the products of different terms cancel in expectation, which the data's targets would not.
    """
    term = weighted.term
    if term.value_edge is None:
        raise ValueError(
            f"fisher='empirical' needs a loss that is recognised, or none at all; the {term.function} has no targets. "
            "Leave likelihood='auto'."
        )
    edges = [edge for edge, _ in term.edges]
    gradients = torch.autograd.grad([term.value_edge], edges, [weighted.derivative], retain_graph=True)
    weights = term.weights_in_loss(weighted.derivative)
    signs = torch.randint(0, 2, weights.shape, generator=generator, device=weights.device) * 2 - 1
    factor = torch.where(weights > 0, signs / weights.sqrt(), torch.zeros_like(weights))
    if term.likelihood.vector_valued:
        factor = factor.unsqueeze(-1).expand(term.logits.shape)
    laid_out = term.layout(factor)
    return [(edge, gradient * laid_out) for edge, gradient in zip(edges, gradients, strict=True)]


def derivatives(seeds: Seeds, inputs: Sequence[GradientEdge], scale: float = 1.0) -> list[Tensor | None]:
    """Back-propagate seeds, scaled, to the inputs; None where they do not arrive."""
    outputs, values = _laid_out(seeds, scale)
    found = _explained(torch.autograd.grad, outputs, inputs, values, retain_graph=True, allow_unused=True)
    return list(found)


def _laid_out(seeds: Seeds, scale: float) -> tuple[list[GradientEdge], list[Tensor]]:
    """The edges of seeds, and the seeds, scaled, as back-propagation takes them there."""
    values = []
    for edge, seed in seeds:
        metadata = edge.node._input_metadata[edge.output_nr]
        values.append((seed * scale).to(metadata.dtype).reshape(metadata.shape))
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
    mean_fraction: float | None = None,
    on_failure: OnFailure = _raised,
) -> dict[int, Statistics]:
    """The statistics of every call that the seeds reach.

    Args:
        passes: From :func:`seed_passes`.
        calls: What was recorded in the forward.
        scale: From :func:`seed_scale`; undone here.
        test: The self-test of the layers that wait for it, or None.
        examples: By layer, what takes the gradients of single examples.
        mean_fraction: Where the seed is that of a whole loss, a mean over examples: the loss's fraction of the
            optimizer step; None for seeds of terms.
        on_failure: Called with the name of a layer whose statistics could not be formed, and with the error.

    Returns:
        Statistics by the position of the call.
    """
    edges = [call.edge for call in calls]
    factors = _factors(calls, scale, mean_fraction)
    reached: dict[int, Statistics] = {}
    jointly: dict[str, list[tuple[int, Call, Tensor]]] = {}

    def take(index: int, gradient: Tensor) -> None:
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

    arrivals: Arrivals | None = None
    for seeds in passes:
        extra = test.parameters() if test is not None else []
        if not edges and not extra:
            break
        outputs, values = _laid_out(seeds, scale)
        if arrivals is None:
            arrivals = Arrivals(outputs, edges)
        found = _explained(arrivals.send, outputs, values, take, extra)
        if test is not None:
            test.check(calls, found)
        with torch.no_grad():
            for layer, parts in jointly.items():
                assert examples is not None
                parts.sort(key=lambda part: part[0])
                examples[layer].add([(call, arrived) for _, call, arrived in parts], factors[parts[0][0]])
        jointly.clear()
    return dict(sorted(reached.items()))


def _factors(calls: Sequence[Call], scale: float, mean_fraction: float | None) -> list[float]:
    """What products of two derivatives at each call's output are to be multiplied by."""
    if mean_fraction is None:
        return [1.0 / scale**2] * len(calls)
    sizes = {index: _examples(call) for index, call in enumerate(calls) if call.adapter.has_rows}
    # A parameter that no call explains has no batch of its own.
    batch = max(sizes.values(), default=1)
    return [sizes.get(index, batch) / mean_fraction / scale**2 for index in range(len(calls))]


def _examples(call: Call) -> int:
    """The number of examples of a call, which its adapter alone can tell from positions and channels."""
    return call.adapter.output_rows(torch.empty(call.output_shape, device="meta")).shape[0]


def empirical_statistics_of_loss(
    loss: Tensor,
    calls: Sequence[Call],
    *,
    loss_scale: float,
    loss_fraction: float,
    test: SelfTest | None,
    examples: Mapping[str, ExampleGradients] | None = None,
    on_failure: OnFailure = _raised,
) -> dict[int, Statistics]:
    r"""The empirical Fisher of a loss whose terms are not recognised, taken to be a mean over examples.

    With :math:`h = \frac{f}{N}\sum_i h_i`, f the loss's fraction of the optimizer step, the rows of h itself are
    :math:`f/N` of those of the examples, so that :math:`G = (N/f)\sum_r g_r g_r^\top`, N the examples of each call.
    """
    seeds: Seeds = [(loss_edge(loss), torch.full_like(loss, 1.0 / loss_scale))]
    return back_propagate(iter([seeds]), calls, 1.0, test, examples, mean_fraction=loss_fraction, on_failure=on_failure)
