r"""How activations and derivatives of a convolution are related over space: what KFC assumes, measured.

The paper's sec. 5.1 asks of a trained network whether its assumptions hold (arXiv:1602.01407): *spatial homogeneity*
(first and second moments depend on the offset between two locations alone) and *spatially uncorrelated derivatives*
(:math:`E[g_t g_{t'}^\top] = 0` for :math:`t \ne t'`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_kfc.estimation.recording import ForwardHook
from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.layers import Forward

Quantity = Literal["activations", "derivatives"]

#: Modules with maps over two spatial dimensions.
SPATIAL_MODULES = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class SpatialStatistics:
    r"""What the maps of one layer show of the paper's assumptions.

    Attributes:
        layer: The layer's name.
        quantity: ``"activations"``: what the layer reads; ``"derivatives"``: those at its output.
        autocorrelation: The mean over channels of the correlation between the values of a channel at two locations,
            by their offset, shape ``(2 r_y + 1, 2 r_x + 1)``, offset 0 in the middle. NaN where every channel is
            constant.
        inhomogeneity: How much the second moment differs between locations: its standard deviation over locations
            divided by its mean, a mean over channels; 0 where all locations are alike. Noise alone gives about
            :math:`\sqrt{2/N}` for N examples of a normal distribution.
        examples: The number of maps behind it; with several targets an example, that many times the examples.
    """

    layer: str
    quantity: Quantity
    autocorrelation: Tensor
    inhomogeneity: float
    examples: int

    @property
    def nearest(self) -> float:
        """The mean correlation with the four nearest neighbours (two where maps have one row or column)."""
        middle_y, middle_x = (size // 2 for size in self.autocorrelation.shape)
        neighbours = []
        if middle_y:
            neighbours.append(self.autocorrelation[middle_y + 1, middle_x])
        if middle_x:
            neighbours.append(self.autocorrelation[middle_y, middle_x + 1])
        # An offset and its opposite have the same correlation.
        return float(torch.stack(neighbours).mean()) if neighbours else 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude of a correlation between two different locations."""
        flat = self.autocorrelation.abs().flatten()
        others = torch.cat([flat[: len(flat) // 2], flat[len(flat) // 2 + 1 :]])
        return float(others.max()) if len(others) else 0.0


def autocorrelation(maps: Tensor, radius: int, *, centred: bool) -> Tensor:
    r"""The correlation between values of the same channel at two locations, by their offset.

    For an offset :math:`\delta`, :math:`\sum x_t x_{t+\delta} / \sqrt{\sum x_t^2 \sum x_{t+\delta}^2}` over all
    examples and all t such that both locations exist, averaged over channels.

    Args:
        maps: Shape ``(examples, channels, height, width)``.
        radius: The largest offset along each axis; smaller where the maps are.
        centred: Whether each channel's mean over examples and locations is subtracted first. Derivatives have
            mean 0 in the model, so theirs are not centred.

    Returns:
        Shape ``(2 r_y + 1, 2 r_x + 1)`` with ``r = min(radius, size - 1)``; NaN where every channel is constant.
    """
    height, width = maps.shape[2:]
    r_y, r_x = min(radius, height - 1), min(radius, width - 1)
    x = maps.detach().double()
    if centred:
        x = x - x.mean((0, 2, 3), keepdim=True)
    result = x.new_full((2 * r_y + 1, 2 * r_x + 1), torch.nan)
    for dy in range(r_y + 1):
        for dx in range(-r_x, r_x + 1):
            if dy == 0 and dx < 0:
                continue
            here = x[:, :, : height - dy, max(0, -dx) : width - max(0, dx)]
            there = x[:, :, dy:, max(0, dx) : width - max(0, -dx)]
            products = (here * there).sum((0, 2, 3))
            sizes = (here.square().sum((0, 2, 3)) * there.square().sum((0, 2, 3))).sqrt()
            alive = sizes > 0
            if bool(alive.any()):
                value = (products[alive] / sizes[alive]).mean()
                result[r_y + dy, r_x + dx] = result[r_y - dy, r_x - dx] = value
    return result


def inhomogeneity(maps: Tensor, *, centred: bool) -> float:
    """How much the second moment of a channel differs between locations; see :class:`SpatialStatistics`.

    Args:
        maps: Shape ``(examples, channels, height, width)``.
        centred: Whether each channel's mean over examples and locations is subtracted first.
    """
    x = maps.detach().double()
    if centred:
        x = x - x.mean((0, 2, 3), keepdim=True)
    moment = x.square().mean(0).flatten(1)
    mean = moment.mean(1)
    alive = mean > 0
    if not bool(alive.any()):
        return 0.0
    return float((moment.std(1, correction=0)[alive] / mean[alive]).mean())


def spatial_modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of some modules whose maps have two spatial dimensions."""
    return {name: module for name, module in modules.items() if isinstance(module, SPATIAL_MODULES)}


class MapWatcher:
    """Keeps maps of some layers while a loss is computed and derivatives are sent back.

    Attach it around the forward. Derivatives are kept while :attr:`listening`: the seeds' ones, not those of the
    loss itself, whose targets are the data's.

    Args:
        modules: The modules by layer name, all of :data:`SPATIAL_MODULES`.
        radius: The largest offset along each axis.
        max_examples: At most so many examples of a batch are kept.
        max_channels: At most so many channels are kept, evenly spread; None for all.
        max_passes: At most so many back-propagations are kept (several where all targets are taken); None for all.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        radius: int = 4,
        max_examples: int = 64,
        max_channels: int | None = 32,
        max_passes: int | None = 16,
    ) -> None:
        self._modules = modules
        self._radius = radius
        self._max_examples = max_examples
        self._max_channels = max_channels
        self._max_passes = max_passes
        self._handles: list[RemovableHandle] = []
        self._activations: dict[str, list[Tensor]] = {}
        self._derivatives: dict[str, list[Tensor]] = {}
        self.listening = False

    def attach(self) -> None:
        """Watch the modules' forwards."""
        for name, module in self._modules.items():
            hook = ForwardHook(partial(self._seen, name))
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Watch no more forwards; derivatives of those that were seen still arrive."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def statistics(self) -> tuple[SpatialStatistics, ...]:
        """What was seen, layer by layer in the model's order: activations, then derivatives; layers not seen are out.

        A layer that was called several times has the maps of all calls.
        """
        found = []
        for name in self._modules:
            if name in self._activations:
                found.append(self._summary(name, "activations", self._activations[name]))
            if name in self._derivatives:
                found.append(self._summary(name, "derivatives", self._derivatives[name]))
        return tuple(entry for entry in found if entry is not None)

    def _summary(self, layer: str, quantity: Quantity, kept: list[Tensor]) -> SpatialStatistics | None:
        shape = kept[0].shape[1:]
        maps = torch.cat([part for part in kept if part.shape[1:] == shape])
        if not bool(torch.isfinite(maps).all()):
            return None
        centred = quantity == "activations"
        correlation = autocorrelation(maps, self._radius, centred=centred).cpu()
        return SpatialStatistics(layer, quantity, correlation, inhomogeneity(maps, centred=centred), len(maps))

    def _seen(self, name: str, forward: Forward, output: Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            self._activations.setdefault(name, []).append(self._part(forward.first()))
            output.register_hook(partial(self._arrived, name))  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def _arrived(self, name: str, gradient: Tensor) -> None:
        kept = self._derivatives.setdefault(name, []) if self.listening else None
        if kept is not None and (self._max_passes is None or len(kept) < self._max_passes):
            kept.append(self._part(gradient))

    def _part(self, maps: Tensor) -> Tensor:
        """A copy of some maps, with an axis of examples."""
        batched = maps.detach() if maps.ndim == 4 else maps.detach().unsqueeze(0)
        stride = 1 if self._max_channels is None else -(-batched.shape[1] // self._max_channels)
        return batched[: self._max_examples, ::stride].to(factor_dtype(maps.dtype), copy=True)
