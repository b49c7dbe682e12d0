"""Results of a comparison of curvature matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_kfc.analysis.assumptions import Assumption

#: Labels of the approximations in tables and plots.
TITLES = {
    "kfc": "KFC (expand)",
    "reduce": "K-FAC reduce",
    "ekfac": "EKFAC",
    "diagonal": "diagonal",
    "identity": "identity",
}


@dataclass(frozen=True, eq=False)
class Approximation:
    r"""One approximation :math:`\hat F` of a layer's block F.

    Attributes:
        name: ``"kfc"``, ``"reduce"``, ``"ekfac"``, ``"diagonal"``, or ``"identity"`` (its multiple nearest to F).
        error: :math:`\|\hat F - F\| / \|F\|` in the Frobenius norm.
        shape_error: The error of the multiple of :math:`\hat F` that is nearest to F.
        eigenvalues: The eigenvalues of :math:`\hat F`, descending, ``(groups * d_out * d_in,)``, in units of the loss.
        cosine: Between the preconditioned gradients :math:`(\hat F + \lambda I)^{-1}\nabla` and
            :math:`(F + \lambda I)^{-1}\nabla`; 0 for a zero gradient.
        distance: The relative error of :math:`(\hat F + \lambda I)^{-1}\nabla`, in the Euclidean norm.
        split_cosine: For Kronecker factors, the cosine with the damping split over both factors (E4), as with
            ``inverse="cholesky"``; else None.
    """

    name: str
    error: float
    shape_error: float
    eigenvalues: Tensor
    cosine: float
    distance: float
    split_cosine: float | None = None


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One layer's block and its approximations.

    Attributes:
        layer: The layer's name.
        kind: Its kind, as in the coverage report.
        parameters: The number of its parameters d.
        eigenvalues: The eigenvalues of the exact block, descending, ``(d,)``.
        approximations: The approximations of the block.
        assumptions: The errors of the three assumptions; empty if the layer is called several times, is grouped, or
            is too large.
    """

    layer: str
    kind: str
    parameters: int
    eigenvalues: Tensor
    approximations: tuple[Approximation, ...]
    assumptions: tuple[Assumption, ...] = ()

    def __getitem__(self, name: str) -> Approximation:
        """The approximation of a name.

        Raises:
            KeyError: If the layer has no approximation of this name.
        """
        for approximation in self.approximations:
            if approximation.name == name:
                return approximation
        raise KeyError(f"layer {self.layer!r} has no approximation {name!r}; it has {[*self.names()]}")

    def names(self) -> Iterator[str]:
        """The names of the approximations."""
        return (approximation.name for approximation in self.approximations)


@dataclass(frozen=True, eq=False)
class Comparison:
    r"""The layers of a network; prints as a table.

    Attributes:
        layers: By name.
        damping: :math:`\lambda` of the preconditioned gradients.
        seeds: The number of back-propagations in the dense matrix.
        skipped: Layers that were left out, with the reason.
    """

    layers: Mapping[str, LayerComparison]
    damping: float
    seeds: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> LayerComparison:
        """One layer."""
        return self.layers[layer]

    def __str__(self) -> str:
        """A table with a line for each layer and approximation, then the errors of the assumptions."""
        width = max([5, *(len(f"{name} ({entry.parameters:,})") for name, entry in self.layers.items())])
        columns = f"{'Error':>8}{'rescaled':>10}{'Cosine':>8}{'split':>8}{'Distance':>10}"
        header = f"{'Layer':<{width}}  {'Curvature':<13}{columns}"
        lines = ["-" * len(header), header, "-" * len(header)]
        for name, entry in self.layers.items():
            label = f"{name} ({entry.parameters:,})"
            for a in entry.approximations:
                split = "" if a.split_cosine is None else f"{a.split_cosine:.3f}"
                numbers = f"{a.error:>8.3f}{a.shape_error:>10.3f}{a.cosine:>8.3f}{split:>8}{a.distance:>10.3f}"
                lines.append(f"{label:<{width}}  {TITLES[a.name]:<13}{numbers}")
                label = ""
        lines.append("-" * len(header))
        assumed = {name: entry.assumptions for name, entry in self.layers.items() if entry.assumptions}
        if assumed:
            lines.append("Error as KFC's assumptions are made one after the other:")
            lines += [
                f"  {name:<{width}}" + "".join(f"  {a.name} {a.error:.3f}" for a in made)
                for name, made in assumed.items()
            ]
        lines += [f"Left out: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join(lines)
