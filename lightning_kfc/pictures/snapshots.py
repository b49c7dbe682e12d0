"""Spectra of the layers' factors over time, for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer

#: Most shown layers, evenly spread over the network; more would not be legible.
MOST_LAYERS = 10
#: Larger factors, whose decomposition takes seconds on a CPU, are not drawn.
LARGEST_FACTOR = 1024
#: Most kept steps; when there are more, every second one is dropped.
MOST_TIMES = 12


def shown(names: Iterable[str]) -> list[str]:
    """At most :data:`MOST_LAYERS` of the names, evenly spread, including the first and the last."""
    names = list(names)
    if len(names) <= MOST_LAYERS:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def shown_factors(layers: Mapping[str, Layer]) -> dict[str, dict[str, Tensor]]:
    """The Kronecker factors to draw, by layer and name."""
    usable = {name: layer.factors for name, layer in layers.items() if set(layer.factors) == {"A", "G"}}
    return {name: usable[name] for name in shown(usable)}


def spectrum(factor: Tensor) -> Tensor | None:
    """The eigenvalues of all groups of a factor, descending, on the CPU.

    Args:
        factor: Shape ``(groups, d, d)``, or ``(groups, d)`` if diagonal.

    Returns:
        Shape ``(groups * d,)``; None if the factor is too large, or has no finite decomposition.
    """
    if not bool(torch.isfinite(factor).all()) or (factor.ndim == 3 and factor.shape[-1] > LARGEST_FACTOR):
        return None
    try:
        values = torch.linalg.eigvalsh(factor) if factor.ndim == 3 else factor
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's stubs leave it out
        return None
    return values.flatten().sort(descending=True).values.cpu()


class SpectraOverTime:
    """The spectra of the factors of some layers, at a few steps."""

    def __init__(self) -> None:
        self._taken: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
        self._times: list[int] = []

    def take(self, step: int, layers: Mapping[str, Layer]) -> None:
        """Take the spectra of a step, once."""
        if step in self._times:
            return
        self._times.append(step)
        for name, factors in shown_factors(layers).items():
            own = self._taken.setdefault(name, {})
            for key, factor in factors.items():
                values = spectrum(factor)
                if values is not None:
                    own.setdefault(key, []).append((step, values))
        if len(self._times) > MOST_TIMES:
            # The first step stays, for comparison.
            self._times = self._times[::2]
            for own in self._taken.values():
                for key, snapshots in own.items():
                    own[key] = [entry for entry in snapshots if entry[0] in self._times]

    def by_layer(self) -> dict[str, dict[str, list[tuple[int, Tensor]]]]:
        """Steps with eigenvalues, by layer and factor; layers without spectra are left out."""
        kept = {name: {key: taken for key, taken in own.items() if taken} for name, own in self._taken.items()}
        return {name: own for name, own in kept.items() if own}
