"""Compare the dense Fisher block of each layer with its approximations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_kfc.analysis.assumptions import MAX_OPERATIONS, RowRecorder, Rows, assumption_errors
from lightning_kfc.analysis.dense import eigenvalues_of_rows, evaluate, seed_gradients
from lightning_kfc.analysis.results import Approximation, Comparison, LayerComparison
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors.inverses import CholeskyInverse, DiagonalInverse, EighInverse, EkfacInverse, Inverse
from lightning_kfc.factors.products import sandwich
from lightning_kfc.kfc import KFC
from lightning_kfc.losses.likelihoods import Likelihood
from lightning_kfc.utilities.checks import check_integer, check_positive
from lightning_kfc.utilities.isolation import leaving_no_trace


def compare_curvature(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    layers: str | Sequence[str] | None = None,
    damping: float = 0.01,
    likelihood: str | Likelihood = "auto",
    max_parameters: int = 4000,
) -> Comparison:
    r"""Compare each layer's exact Fisher block with its approximations, on one batch.

    The exact block takes one back-propagation for each term and outcome of the loss, and has :math:`d^2` elements for
    a layer with d parameters, so the batch and the layers must be small. The model's parameters and mode (training or
    evaluation) are used as they are; buffers, random streams and ``.grad`` stay unchanged. In float32, small
    eigenvalues are rounding errors; use ``model.double()`` and double inputs for them.

    Args:
        model: The model.
        loss: Computes the loss of the batch; called several times.
        layers: Glob patterns over module names; None for all layers with Kronecker factors.
        damping: :math:`\lambda > 0`, of the preconditioned gradients.
        likelihood: As the option of :class:`~lightning_kfc.KFC`.
        max_parameters: Larger layers are left out.

    Raises:
        LossNotRecognisedError: If the loss holds no recognised term.
        ValueError: If a pattern matches nothing, or the dense matrix would take too many back-propagations.
    """
    check_positive("damping", damping)
    check_integer("max_parameters", max_parameters, minimum=1)
    with leaving_no_trace(model), torch.enable_grad():
        # Without a recognised term the engine would use the empirical Fisher, which is another matrix.
        evaluate(model, loss, likelihood)
    expand = _observed(model, loss, layers, likelihood, "expand")
    chosen, skipped = _choose(expand.layers, max_parameters)
    if not chosen:
        return Comparison({}, damping, 0, skipped)
    adapters = {name: layer.adapter for name, layer in chosen.items()}
    recorder = RowRecorder({name: adapter for name, adapter in adapters.items() if adapter.pairs_rows})
    with leaving_no_trace(model), torch.enable_grad():
        with recorder.recording():
            value, terms = evaluate(model, loss, likelihood)
        seeds = seed_gradients(terms, adapters)
        rows = recorder.rows(terms)
        gradients = _gradients(value, chosen)
    reduce = _observed(model, loss, layers, likelihood, "reduce")
    compared = {
        name: _compare(layer, reduce.layers.get(name), seeds[name], gradients[name], rows.get(name), damping)
        for name, layer in chosen.items()
    }
    return Comparison(compared, damping, max((len(u) for u in seeds.values()), default=0), skipped)


def _observed(
    model: nn.Module,
    loss: Callable[[], Tensor],
    layers: str | Sequence[str] | None,
    likelihood: str | Likelihood,
    weight_sharing: str,
) -> KFC:
    """An engine with the exact statistics of the batch."""
    include = [layers] if isinstance(layers, str) else layers
    kfc = KFC(
        model,
        fisher="exact",
        inverse="ekfac",
        weight_sharing=weight_sharing,
        likelihood=likelihood,
        max_factor_dim=None,
        include=include,
    )
    with leaving_no_trace(model), torch.enable_grad():
        with kfc.capture():
            value = loss()
        kfc.update(value)
    return kfc


def _choose(layers: Mapping[str, Layer], max_parameters: int) -> tuple[dict[str, Layer], dict[str, str]]:
    chosen, skipped = {}, {}
    for name, layer in layers.items():
        count = torch.Size(layer.adapter.matrix_shape()).numel()
        if set(layer.factors) != {"A", "G"}:
            skipped[name] = "it has no pair of Kronecker factors" if layer.factors else "the loss does not reach it"
        elif count > max_parameters:
            skipped[name] = f"{count:,} parameters > max_parameters={max_parameters:,}"
        else:
            chosen[name] = layer
    return chosen, skipped


def _gradients(value: Tensor, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The loss's gradient of each layer, ``(groups, d_out, d_in)``."""
    owned = {name: layer.adapter.own_parameters() for name, layer in layers.items()}
    parameters = [p for own in owned.values() for p in own.values()]
    found = iter(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))
    return {
        name: layers[name].adapter.matrix({role: next(found) for role in own}).double() for name, own in owned.items()
    }


def _compare(
    layer: Layer, reduced: Layer | None, seeds: Tensor, gradient: Tensor, rows: Rows | None, damping: float
) -> LayerComparison:
    exact = seeds.T @ seeds
    wanted = torch.linalg.solve(exact + damping * torch.eye(len(exact)).to(exact), gradient.flatten())
    judge = _Judge(exact, wanted, gradient, damping)
    found = [judge.kronecker("kfc", layer)]
    if reduced is not None and set(reduced.factors) == {"A", "G"}:
        found.append(judge.kronecker("reduce", reduced))
    if isinstance(layer.inverse, EkfacInverse) and layer.inverse.weight:
        found.append(judge.ekfac(layer.inverse))
    found += [judge.diagonal(), judge.identity()]
    small_enough = rows is not None and rows.operations <= MAX_OPERATIONS
    assumptions = assumption_errors(rows, exact) if rows is not None and small_enough else ()
    eigenvalues = eigenvalues_of_rows(seeds).cpu()
    return LayerComparison(layer.name, layer.adapter.kind, len(exact), eigenvalues, tuple(found), assumptions)


@dataclass(frozen=True, eq=False)
class _Judge:
    """Measures approximations of one block.

    Attributes:
        exact: The block F.
        wanted: The exact preconditioned gradient, a vector.
        gradient: ``(groups, d_out, d_in)``.
        damping: The damping of the preconditioned gradients.
    """

    exact: Tensor
    wanted: Tensor
    gradient: Tensor
    damping: float

    def kronecker(self, name: str, layer: Layer) -> Approximation:
        factors = {key: factor.double() for key, factor in layer.factors.items()}
        inverse = EighInverse.factorise(factors, self.damping)
        matrix = self._dense(lambda m: sandwich(factors["G"], m, factors["A"]))
        split = CholeskyInverse.factorise(factors, self.damping).solve(self.gradient).flatten()
        return self._measure(name, matrix, inverse.values, inverse, _cosine(split, self.wanted))

    def ekfac(self, inverse: EkfacInverse) -> Approximation:
        values = inverse.values.double()
        exact = EighInverse(inverse.A_vectors.double(), inverse.G_vectors.double(), values, self.damping)
        matrix = self._dense(lambda m: exact.basis.back(exact.basis.project(m) * values))
        return self._measure("ekfac", matrix, values, exact)

    def diagonal(self) -> Approximation:
        values = self.exact.diagonal()
        inverse = DiagonalInverse.factorise({"F": values.reshape(len(self.gradient), -1)}, self.damping)
        return self._measure("diagonal", torch.diag(values), values, inverse)

    def identity(self) -> Approximation:
        values = self.exact.diagonal().mean().expand(len(self.exact))
        inverse = DiagonalInverse.factorise({"F": values.reshape(len(self.gradient), -1)}, self.damping)
        return self._measure("identity", torch.diag(values), values, inverse)

    def _dense(self, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """The matrix of a symmetric linear map of gradients; its rows are the images of the unit vectors."""
        units = torch.eye(len(self.exact), dtype=self.exact.dtype, device=self.exact.device)
        return apply(units.reshape(-1, *self.gradient.shape)).reshape(self.exact.shape)

    def _measure(
        self, name: str, matrix: Tensor, values: Tensor, inverse: Inverse, split_cosine: float | None = None
    ) -> Approximation:
        size, own = float(self.exact.norm()), float(matrix.norm())
        overlap = float((matrix * self.exact).sum())
        multiple = overlap / own**2 if own else 0.0
        found = inverse.solve(self.gradient).flatten()
        length = float(self.wanted.norm())
        return Approximation(
            name=name,
            error=float((matrix - self.exact).norm()) / size if size else 0.0,
            shape_error=float((multiple * matrix - self.exact).norm()) / size if size else 0.0,
            eigenvalues=values.flatten().sort(descending=True).values.cpu(),
            cosine=_cosine(found, self.wanted),
            distance=float((found - self.wanted).norm()) / length if length else 0.0,
            split_cosine=split_cosine,
        )


def _cosine(found: Tensor, wanted: Tensor) -> float:
    lengths = float(found.norm() * wanted.norm())
    return float(found @ wanted) / lengths if lengths else 0.0
