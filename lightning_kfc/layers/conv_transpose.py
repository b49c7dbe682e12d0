"""Transposed convolutions, as plain convolutions of an input with zeros between its pixels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_kfc.factors.convolution.geometry import Geometry
from lightning_kfc.layers.conv import ConvAdapter
from lightning_kfc.layers.forward import Forward
from lightning_kfc.layers.registry import register_adapter


@register_adapter(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeAdapter(ConvAdapter):
    """Each output location is a row: the patch under the flipped kernel, of the input with zeros between its pixels."""

    kind: ClassVar[str] = "ConvTranspose"
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d  # type: ignore[assignment]  # no subclass of the plain convolutions

    def geometry(self, forward: Forward) -> Geometry:
        """The geometry of the patches; the output's size determines the padding at the far ends."""
        m = self.module
        assert not isinstance(m.padding, str)
        added = [
            n_out - ((n - 1) * stride - 2 * padding + dilation * (size - 1) + 1)
            for n, n_out, size, stride, padding, dilation in zip(
                self._batched(forward.first()).shape[2:],
                self._batched(forward.output).shape[2:],
                m.kernel_size,
                m.stride,
                m.padding,
                m.dilation,
                strict=True,
            )
        ]
        return Geometry.transposed(m.kernel_size, m.stride, m.padding, m.dilation, added, m.groups)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight ``(C_in, C_out / groups, *k)`` with its kernel flipped, as ``(groups, d_out, columns)``."""
        flipped = weight.flip(list(range(2, weight.ndim)))
        by_group = flipped.reshape(self.groups, -1, *weight.shape[1:])
        return by_group.transpose(1, 2).flatten(2)

    def weight_tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`weight_matrix`."""
        by_group = matrix.reshape(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
        return by_group.transpose(1, 2).reshape(shape).flip(list(range(2, len(shape))))
