"""Tests of the paper's sec. 5.1 on a network and a batch: uncorrelated derivatives, and homogeneity over space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_kfc.kfc import KFC
from lightning_kfc.losses.likelihoods import Likelihood
from lightning_kfc.monitoring.spatial import Quantity, SpatialStatistics
from lightning_kfc.reporting.map_watcher import MapWatcher, spatial_modules
from lightning_kfc.utilities.checks import check_integer
from lightning_kfc.utilities.isolation import leaving_no_trace


@dataclass(frozen=True)
class SpatialReport:
    """The spatial statistics of a network's convolutions; prints as a table.

    Attributes:
        statistics: In the model's order; for each layer, first the activations, then the derivatives.
    """

    statistics: tuple[SpatialStatistics, ...]

    def of(self, layer: str, quantity: Quantity) -> SpatialStatistics:
        """The statistics of one layer's ``"activations"`` or ``"derivatives"``.

        Raises:
            KeyError: If there are no such statistics.
        """
        for entry in self.statistics:
            if (entry.layer, entry.quantity) == (layer, quantity):
                return entry
        raise KeyError(f"no {quantity} of layer {layer!r}; there are those of {sorted({*self.layers})}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(dict.fromkeys(entry.layer for entry in self.statistics))

    def __str__(self) -> str:
        """A table with a line for each layer and quantity."""
        width = max([5, *(len(entry.layer) for entry in self.statistics)])
        header = f"{'Layer':<{width}}  {'Quantity':<13}{'Nearest':>8}{'Largest':>9}{'Inhomogeneity':>15}{'Maps':>8}"
        rule = "-" * len(header)
        lines = [
            f"{e.layer:<{width}}  {e.quantity:<13}{e.nearest:>8.3f}{e.largest:>9.3f}{e.inhomogeneity:>15.3f}"
            f"{e.examples:>8,}"
            for e in self.statistics
        ]
        return "\n".join([rule, header, rule, *lines, rule])


def spatial_statistics(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    layers: str | Sequence[str] | None = None,
    radius: int = 4,
    fisher: str = "exact",
    likelihood: str | Likelihood = "auto",
    max_examples: int = 512,
) -> SpatialReport:
    """Measure the correlations over space of each convolution's activations and derivatives, on one batch.

    The derivatives are those of targets from the model's distribution, as in the Fisher matrix.

    Args:
        model: The model; it stays unchanged.
        loss: Computes the loss of the batch; called once.
        layers: Glob patterns over module names; None for all two-dimensional convolutions, plain and transposed.
        radius: The largest offset along each axis, at least 1.
        fisher: ``"exact"``: one back-propagation for each outcome of every term; ``"mc"``: one sample a term.
        likelihood: As the option of :class:`~lightning_kfc.KFC`.
        max_examples: The largest number of used examples of the batch.

    Raises:
        LossNotRecognisedError: If the loss holds no recognised term.
        ValueError: If the model has no such layer.
    """
    check_integer("radius", radius, minimum=1)
    include = [layers] if isinstance(layers, str) else layers
    kfc = KFC(model, fisher=fisher, likelihood=likelihood, include=include)
    modules = spatial_modules({name: layer.adapter.module for name, layer in kfc.layers.items()})
    if not modules:
        raise ValueError(
            "Spatial statistics need a Conv2d or ConvTranspose2d layer, and the model has none. Its layers are: "
            f"{', '.join(kfc.layers)}."
        )
    watcher = MapWatcher(modules, radius=radius, max_examples=max_examples, max_channels=None, max_passes=None)
    with leaving_no_trace(model), torch.enable_grad():
        watcher.attach()
        try:
            with kfc.capture():
                value = loss()
        finally:
            watcher.detach()
        watcher.listening = True
        kfc.update(value)
        watcher.listening = False
    return SpatialReport(watcher.statistics())
