"""``torch.nn.Conv2d``: rows are patches, one per output location (KFC, Grosse & Martens 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_kfc.factors.patches import Geometry, patch_chunks, patch_rows, patch_second_moment
from lightning_kfc.factors.statistics import InputStatistic, append_ones, factor_dtype
from lightning_kfc.layers.adapter import Adapter, Forward
from lightning_kfc.layers.registry import register_adapter


@register_adapter(nn.Conv2d)
class ConvAdapter(Adapter):
    r"""The factors :math:`\Omega \otimes \Gamma` of the paper's theorem 1, as :math:`A \otimes G` (E1, E2, E3)."""

    kind = "Conv"
    module: nn.Conv2d

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Grouped convolutions need a pair of factors for each group."""
        assert isinstance(module, nn.Conv2d)
        return None if module.groups == 1 else f"convolution with groups={module.groups} has no factors yet"

    @property
    def groups(self) -> int:
        """The convolution's own groups."""
        return self.module.groups

    def geometry(self) -> Geometry:
        """Where the module reads its input."""
        m = self.module
        return Geometry.of(m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode, m.groups)

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == self.module.weight.ndim else tensor.unsqueeze(0)

    def _images(self, forward: Forward) -> Tensor:
        images = self._batched(forward.first())
        return images.to(factor_dtype(images.dtype))

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """Patches, in the order of ``torch.nn.functional.unfold``."""
        return patch_rows(self._images(forward), self.geometry())

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """The channels at each output location."""
        gradient = self._batched(output_gradient)
        examples, channels = gradient.shape[:2]
        by_location = gradient.flatten(2).transpose(1, 2)
        return by_location.reshape(examples, by_location.shape[1], self.groups, channels // self.groups)

    def project(self, forward: Forward, direction: Tensor) -> Tensor:
        """Patches times one direction, a chunk of patches at a time."""
        own = self.own_parameters()
        if "weight" not in own:
            return super().project(forward, direction)
        chunks = patch_chunks(self._images(forward), self.geometry())
        rows = (append_ones(chunk) if "bias" in own else chunk for chunk in chunks)
        return torch.cat([torch.einsum("ntgi,gi->ntg", chunk, direction.to(chunk)) for chunk in rows])

    def input_statistic(self, forward: Forward) -> InputStatistic:
        """The patches' second moment, a chunk of patches at a time."""
        own = self.own_parameters()
        if self.weight_sharing == "reduce" or "weight" not in own:
            return super().input_statistic(forward)
        total, rows = patch_second_moment(self._images(forward), self.geometry(), homogeneous="bias" in own)
        return InputStatistic(total, rows)
