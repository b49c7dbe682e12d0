"""Convolutions in one, two and three dimensions: rows are patches (KFC, Grosse & Martens 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_kfc.factors.convolution.geometry import Geometry
from lightning_kfc.factors.convolution.patches import (
    part_is_cheaper,
    part_of_patch_second_moment,
    patch_rows,
    patch_second_moment,
    patch_second_moment_diagonal,
    project_patches,
)
from lightning_kfc.factors.row_sampling import number_of_parts
from lightning_kfc.factors.statistics import InputStatistic, factor_dtype
from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import Forward
from lightning_kfc.layers.registry import register_adapter

#: Bytes of images that are projected on a direction at a time: larger pieces fragment the memory in the forward.
PROJECTED_BYTES = 2**20


@register_adapter(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvAdapter(Adapter):
    r"""The factors :math:`\Omega \otimes \Gamma` of the paper's theorem 1, as :math:`A \otimes G` (E1, E2, E3).

    Each output location is a row. A grouped convolution has a pair of factors for each group, batched in one tensor;
    in a depthwise one, A has the size of the kernel.
    """

    kind: ClassVar[str] = "Conv"
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def groups(self) -> int:
        """The convolution's own groups."""
        return self.module.groups

    def geometry(self, forward: Forward) -> Geometry:
        """The geometry of the patches."""
        m = self.module
        return Geometry.of(m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode, m.groups)

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == self.module.weight.ndim else tensor.unsqueeze(0)

    def _images(self, forward: Forward) -> Tensor:
        images = self._batched(forward.first())
        return images.to(factor_dtype(images.dtype))

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """Patches, in the order of ``torch.nn.functional.unfold``."""
        return patch_rows(self._images(forward), self.geometry(forward))

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """The channels at each output location."""
        gradient = self._batched(output_gradient)
        examples, channels = gradient.shape[:2]
        by_location = gradient.flatten(2).transpose(1, 2)
        return by_location.reshape(examples, by_location.shape[1], self.groups, channels // self.groups)

    def input_rows(self, forward: Forward) -> Tensor:
        """See :class:`Adapter`; no patches are formed if only the bias is trainable."""
        if "weight" in self.own_parameters():
            return super().input_rows(forward)
        images = self._images(forward)
        return images.new_ones((len(images), self.geometry(forward).positions(images.shape[2:]), self.groups, 1))

    def input_row_chunks(self, forward: Forward, examples: int) -> Iterator[Tensor]:
        """Patches of some images at a time."""
        for images in torch.split(self._images(forward), examples):
            yield self.input_rows(Forward((images,), {}, forward.output))

    def project(self, forward: Forward, direction: Tensor) -> Tensor:
        """Patches times one direction, a few images at a time."""
        own = self.own_parameters()
        if "weight" not in own:
            return super().project(forward, direction)
        images, geometry = self._images(forward), self.geometry(forward)
        along = direction.to(images)
        depth = self.matrix_shape()[2] - ("bias" in own)
        at_once = max(1, PROJECTED_BYTES * len(images) // max(1, images.nbytes))
        parts = [project_patches(some, geometry, along[:, :depth]) for some in torch.split(images, at_once)]
        products = torch.cat(parts)
        return products + along[:, depth] if "bias" in own else products

    def input_statistic(self, forward: Forward, *, reduce: bool) -> InputStatistic:
        """The patches' second moment, a chunk of patches at a time; see :class:`Adapter`."""
        own = self.own_parameters()
        if "weight" not in own:
            return super().input_statistic(forward, reduce=reduce)
        images, geometry, homogeneous = self._images(forward), self.geometry(forward), "bias" in own
        parts = 1 if reduce else self._parts(images, geometry)
        if parts > 1:
            return InputStatistic(*part_of_patch_second_moment(images, geometry, parts, homogeneous=homogeneous))
        form = patch_second_moment_diagonal if "A" in self.diagonal_sides() else patch_second_moment
        return InputStatistic(*form(images, geometry, homogeneous=homogeneous, reduce=reduce))

    def _parts(self, images: Tensor, geometry: Geometry) -> int:
        """The number of parts of the patches, one of which is taken; 1 takes all patches."""
        if "A" in self.diagonal_sides():
            return 1
        positions = geometry.positions(images.shape[2:])
        parts = number_of_parts(len(images), positions, self.matrix_shape()[2], self.options.rows_per_dim)
        return parts if part_is_cheaper(geometry, parts, images) else 1
