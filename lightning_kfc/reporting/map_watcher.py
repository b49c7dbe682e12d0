"""Record the maps of convolutions during a forward and a back-propagation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_kfc.estimation.recording import ForwardHook
from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.layers import Forward
from lightning_kfc.monitoring.spatial import Quantity, SpatialStatistics, autocorrelation, inhomogeneity

#: Modules with maps over two spatial dimensions.
SPATIAL_MODULES = (nn.Conv2d, nn.ConvTranspose2d)


def spatial_modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules whose maps have two spatial dimensions."""
    return {name: module for name, module in modules.items() if isinstance(module, SPATIAL_MODULES)}


class MapWatcher:
    """Keeps maps of some layers in a forward and in the back-propagation of seeds.

    Attach it around the forward. Derivatives are kept while :attr:`listening`, without those of the loss itself, whose
    targets are from the data.

    Args:
        modules: The modules by layer name, all of :data:`SPATIAL_MODULES`.
        radius: The largest offset along each axis.
        max_examples: The largest number of kept examples of a batch.
        max_channels: The largest number of kept channels, evenly spread; None for all.
        max_passes: The largest number of kept back-propagations; None for all.
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
        """Record the modules' forwards."""
        for name, module in self._modules.items():
            hook = ForwardHook(partial(self._seen, name))
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Stop recording forwards; derivatives of recorded forwards are still kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def statistics(self) -> tuple[SpatialStatistics, ...]:
        """Statistics of the recorded maps, in the model's order: of activations, then of derivatives.

        A layer without a call is left out; a layer with several calls has the maps of all of them.
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
