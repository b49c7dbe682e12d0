r"""The errors of KFC's three assumptions on one layer and one batch.

The paper's theorem 1 (arXiv:1602.01407) follows from :math:`F = E[\sum_{tt'} a_t a_{t'}^\top \otimes
g_t g_{t'}^\top]` by three assumptions. They are made one after the other; expectations are means over the batch:

1. independent activations and derivatives:
   :math:`\sum_{tt'} E[a_t a_{t'}^\top] \otimes E[g_t g_{t'}^\top]`;
2. spatially uncorrelated derivatives: only the terms with :math:`t = t'` remain;
3. spatial homogeneity: the mean over all :math:`t` replaces each expectation, which gives :math:`A \otimes G`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_kfc.estimation.back_propagation import derivatives
from lightning_kfc.estimation.recording import ForwardHook, output_edge
from lightning_kfc.estimation.seeds import WeightedTerm, edges_with_seed
from lightning_kfc.layers import Adapter, Forward

#: Most multiply-adds for the errors of a layer's assumptions.
MAX_OPERATIONS = 1e12


@dataclass(frozen=True)
class Assumption:
    """The error under an assumption and all earlier ones.

    Attributes:
        name: ``"independent"``, ``"uncorrelated"`` or ``"homogeneous"``, in this order.
        error: The relative Frobenius error of the layer's block; for the last assumption, the error of KFC.
    """

    name: str
    error: float


@dataclass(frozen=True, eq=False)
class Rows:
    """A layer's rows, example by example.

    Attributes:
        inputs: Shape ``(examples, positions, d_in)``.
        outputs: Rows of each back-propagation, ``(passes, examples, positions, d_out)``.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def operations(self) -> float:
        """The multiply-adds for the block under the first assumption."""
        _, positions, d_in = self.inputs.shape
        examples, d_out = self.outputs.shape[1], self.outputs.shape[3]
        return positions**2 / 2 * (d_in**2 * (d_out**2 + examples))


class RowRecorder:
    """Records input rows and output edges of layers in one forward, without layers that are called twice."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters
        self._seen: dict[str, list[tuple[Tensor, torch.autograd.graph.GradientEdge, torch.Size]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward inside this context."""
        handles = [a.attach(ForwardHook(partial(self._record, name))) for name, a in self._adapters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, forward: Forward, output: Tensor) -> None:
        if output.requires_grad:
            rows = self._adapters[name].input_rows(forward).detach().double()
            self._seen.setdefault(name, []).append((rows, output_edge(output), output.shape))

    def rows(self, terms: list[WeightedTerm]) -> dict[str, Rows]:
        """The rows of layers with one call, one group, and the examples of the terms."""
        examples = {len(weighted.term.logits) for weighted in terms}
        once = {name: calls[0] for name, calls in self._seen.items() if len(calls) == 1}
        usable = {n: c for n, c in once.items() if c[0].shape[2] == 1 and {len(c[0])} == examples}
        if not usable:
            return {}
        found: dict[str, list[Tensor]] = {name: [] for name in usable}
        for weighted in terms:
            generator = torch.Generator(weighted.term.logits.device).manual_seed(0)
            for seed in weighted.term.likelihood.exact_seeds(weighted.term.logits, weighted.weights, generator):
                arrived = derivatives(edges_with_seed(weighted.term, seed), [edge for _, edge, _ in usable.values()])
                for (name, (_, _, shape)), gradient in zip(usable.items(), arrived, strict=True):
                    if gradient is not None:
                        found[name].append(self._adapters[name].output_rows(gradient.reshape(shape))[:, :, 0].double())
        return {
            name: Rows(rows[:, :, 0], torch.stack(found[name])) for name, (rows, _, _) in usable.items() if found[name]
        }


def assumption_errors(rows: Rows, exact: Tensor) -> tuple[Assumption, ...]:
    """The error under each assumption of :mod:`lightning_kfc.analysis.assumptions`.

    Args:
        rows: From :class:`RowRecorder`.
        exact: The layer's block, ``(d_out * d_in, d_out * d_in)``, row-major.
    """
    independent, uncorrelated = _independent(rows)
    examples, positions, _ = rows.inputs.shape
    A = torch.einsum("nti,ntj->ij", rows.inputs, rows.inputs) / (examples * positions)
    G = torch.einsum("pnto,pntq->oq", rows.outputs, rows.outputs)
    estimates: dict[str, Callable[[], Tensor]] = {
        "independent": lambda: independent,
        "uncorrelated": lambda: uncorrelated,
        "homogeneous": lambda: torch.kron(G, A),
    }
    size = exact.norm()
    return tuple(Assumption(name, float((make() - exact).norm() / size)) for name, make in estimates.items())


def _independent(rows: Rows) -> tuple[Tensor, Tensor]:
    """The block under the first assumption, and its part with t = t'."""
    a, g = rows.inputs, rows.outputs
    examples, positions, d_in = a.shape
    d_out = g.shape[3]
    same, other = a.new_zeros(d_in * d_in, d_out * d_out), a.new_zeros(d_in * d_in, d_out * d_out)
    for t in range(positions):
        # Shape (positions from t on, d, d): the first position is t itself.
        inputs = torch.einsum("ni,nsj->sij", a[:, t], a[:, t:]).flatten(1) / examples
        outputs = torch.einsum("pno,pnsq->soq", g[:, :, t], g[:, :, t:]).flatten(1)
        same.addmm_(inputs[:1].T, outputs[:1])
        other.addmm_(inputs[1:].T, outputs[1:])

    def block(matrix: Tensor) -> Tensor:
        by_index = matrix.reshape(d_in, d_in, d_out, d_out).permute(2, 0, 3, 1)
        return by_index.reshape(d_out * d_in, d_out * d_in)

    diagonal, above = block(same), block(other)
    # The pairs (t', t) have the transposes of the pairs (t, t').
    return diagonal + above + above.T, diagonal
