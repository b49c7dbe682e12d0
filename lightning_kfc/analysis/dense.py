r"""The Fisher matrix of a small network by autograd alone: one back-propagation for each term and outcome.

With the exact seeds of all terms, :math:`F = \sum_i c_i J_i^\top H_i J_i = \sum_v u_v u_v^\top`, where
:math:`u_v = J^\top v` is the gradient of one seed of one term. No row, factor or independence enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_kfc.estimation.back_propagation import derivatives
from lightning_kfc.estimation.seeds import WeightedTerm, edges_with_seed, weighted_terms
from lightning_kfc.layers import Adapter
from lightning_kfc.losses.likelihoods import Likelihood
from lightning_kfc.losses.recorder import LossRecorder
from lightning_kfc.losses.selection import LossNotRecognisedError, attach_named_output, unrecognised, wanted_terms

#: Most back-propagations of a dense Fisher matrix; a small batch is enough.
MAX_PASSES = 20_000


def evaluate(
    model: nn.Module, loss: Callable[[], Tensor], likelihood: str | Likelihood = "auto"
) -> tuple[Tensor, list[WeightedTerm]]:
    """Compute a loss, and find its terms with their weights.

    Raises:
        LossNotRecognisedError: If the loss holds no recognised term.
    """
    with LossRecorder() as losses:
        handles = attach_named_output(model, likelihood, losses)
        try:
            value = loss()
        finally:
            for handle in handles:
                handle.remove()
    if losses.failure is not None:
        raise losses.failure
    kept = weighted_terms(value, wanted_terms(losses.terms, likelihood))
    if not kept:
        raise LossNotRecognisedError(unrecognised(losses.terms, likelihood))
    return value, kept


def single_seeds(weighted: WeightedTerm) -> Iterator[Tensor]:
    """The exact seeds of a term of the loss, for one example, position and outcome at a time, shaped as its logits."""
    logits = weighted.term.logits
    rows = logits[..., 0].numel()
    for column in weighted.term.likelihood.exact_seed_columns(logits, weighted.weights):
        flat = column.reshape(rows, -1)
        for row in torch.nonzero(flat.abs().sum(1)).flatten().tolist():
            seed = torch.zeros_like(flat)
            seed[row] = flat[row]
            yield seed.reshape(logits.shape)


def seed_gradients(terms: Sequence[WeightedTerm], adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The gradient of each seed, by layer, as row-major vectors of its joint matrix ``[W b]``.

    Args:
        terms: From :func:`evaluate`; their graph must be alive.
        adapters: The layers' adapters, by name.

    Returns:
        Float64 matrices ``(seeds, groups * d_out * d_in)``, whose second moment ``u.T @ u`` is the layer's block.

    Raises:
        ValueError: If there are more than :data:`MAX_PASSES` seeds.
    """
    # An upper bound, since terms of weight 0 have no seeds.
    count = sum(weighted.term.logits.numel() for weighted in terms)
    if count > MAX_PASSES:
        raise ValueError(
            f"The dense Fisher matrix of this loss takes {count:,} back-propagations, one for each term and outcome; "
            f"the limit is {MAX_PASSES:,}. Give a loss over fewer examples."
        )
    owned = {name: adapter.own_parameters() for name, adapter in adapters.items()}
    inputs = [torch.autograd.graph.get_gradient_edge(p) for own in owned.values() for p in own.values()]
    rows: dict[str, list[Tensor]] = {name: [] for name in adapters}
    for weighted in terms:
        for seed in single_seeds(weighted):
            found = iter(derivatives(edges_with_seed(weighted.term, seed), inputs))
            for name, own in owned.items():
                gradients = {role: _or_zero(next(found), parameter) for role, parameter in own.items()}
                rows[name].append(adapters[name].matrix(gradients).double().flatten())
    return {name: torch.stack(kept) for name, kept in rows.items()}


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.detach().to_dense()


def eigenvalues_of_rows(rows: Tensor) -> Tensor:
    """The eigenvalues of ``rows.T @ rows``, descending, from the smaller of both products, padded with zeros."""
    count, size = rows.shape
    gram = rows @ rows.T if count < size else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return torch.cat([values, values.new_zeros(size - len(values))])
