"""Condition numbers and effective ranks of a layer's factors, estimated at a small cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors.damping import balance
from lightning_kfc.factors.inverses import CholeskyInverse, EighInverse
from lightning_kfc.factors.spectrum import effective_rank, largest_eigenvalues


@dataclass(frozen=True)
class LayerSpectra:
    r"""Numbers of a layer's spectra, without a decomposition of its factors.

    Attributes:
        largest_curvature: A lower bound on :math:`\lambda_{\max}(A)\,\lambda_{\max}(G)`, or of the layer's blocks; the
            largest of its groups.
        conditions: By factor, the condition number of :math:`A + \pi\sqrt\lambda I` (likewise for G: E4), the largest
            of its groups; a lower bound with Cholesky inverses. Only on ranks that hold the inverse.
        effective_ranks: By factor, :math:`(\operatorname{tr} A)^2 / \|A\|_F^2`, the mean of its groups.
    """

    largest_curvature: float
    conditions: Mapping[str, float]
    effective_ranks: Mapping[str, float]

    def as_numbers(self) -> dict[str, float]:
        """The numbers by the last part of the names that loggers show."""
        return {
            "largest_curvature": self.largest_curvature,
            **{f"condition_{name}": value for name, value in self.conditions.items()},
            **{f"effective_rank_{name}": value for name, value in self.effective_ranks.items()},
        }


def spectra_of(layers: Mapping[str, Layer], damping: float) -> dict[str, LayerSpectra]:
    """The spectra of layers that have factors.

    Args:
        layers: The layers by name.
        damping: The damping in force.
    """
    factors = {(name, key): factor for name, layer in layers.items() for key, factor in layer.factors.items()}
    inverses = {
        (name, key): inverse.to(factors[name, key].dtype)
        for name, layer in layers.items()
        if isinstance(layer.inverse, CholeskyInverse)
        for key, inverse in (("A", layer.inverse.A_inverse), ("G", layer.inverse.G_inverse))
        if factors[name, key].shape == inverse.shape
    }
    tops = largest_eigenvalues([*factors.values(), *inverses.values()])
    top = dict(zip(factors, tops, strict=False))
    top_of_inverse = dict(zip(inverses, tops[len(factors) :], strict=True))
    ranks = {key: effective_rank(factor).cpu().double() for key, factor in factors.items()}
    found = {}
    for name, layer in layers.items():
        own = layer.factors
        conditions = {}
        if set(own) == {"A", "G"}:
            pi, root = balance(own["A"], own["G"]).cpu().double(), layer.damping(damping) ** 0.5
            for key, share in (("A", pi * root), ("G", root / pi)):
                smallest = _smallest_damped(layer, key, share, top_of_inverse.get((name, key)))
                if smallest is not None:
                    conditions[key] = float(((top[name, key] + share) / smallest).max())
        largest = torch.ones(())
        for key in own:
            largest = largest * top[name, key]
        mean_ranks = {key: float(ranks[name, key].nanmean()) for key in own}
        found[name] = LayerSpectra(float(largest.max()), conditions, mean_ranks)
    return found


def _smallest_damped(layer: Layer, key: str, share: Tensor, top_of_inverse: Tensor | None) -> Tensor | None:
    """The smallest eigenvalue of a damped factor, from its inverse; None if it is not available."""
    if top_of_inverse is not None:
        return 1 / top_of_inverse
    factor, inverse = layer.factors[key], layer.inverse
    if factor.ndim == 2:
        return factor.amin(-1).cpu().double() + share
    if isinstance(inverse, EighInverse):
        # Eigenvalues are sorted, the smallest first.
        vector = (inverse.A_vectors if key == "A" else inverse.G_vectors)[..., :1]
        value: Tensor = (vector.mT @ factor @ vector).flatten()
        return value.cpu().double().clamp(min=0) + share
    return None
