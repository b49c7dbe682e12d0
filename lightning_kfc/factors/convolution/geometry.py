"""Geometry of convolutions, plain or transposed: the input locations of each output location."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class _AxisPhase:
    """Along one axis: output locations ``upsampling`` apart, which read pixels with the same taps of the kernel."""

    taps: tuple[int, ...]
    dilation: int
    padding: tuple[int, int]


@dataclass(frozen=True)
class Phase:
    """Output locations of an upsampled geometry that read the same kernel offsets, as a plain convolution.

    Attributes:
        geometry: The plain convolution, on the input without zeros between its pixels.
        offsets: The flat indices of its kernel offsets in the whole kernel.
    """

    geometry: Geometry
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution in one, two or three dimensions.

    Attributes:
        kernel_size: Size per dimension.
        stride: Stride per dimension.
        padding: Padding before and after, per dimension; negative to crop pixels.
        dilation: Dilation per dimension.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: Groups of channels.
        upsampling: Distance of the input's pixels with zeros between them, per dimension; 1 for no zeros.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    groups: int = 1
    upsampling: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Replace an empty upsampling by ones."""
        if not self.upsampling:
            object.__setattr__(self, "upsampling", (1,) * len(self.kernel_size))

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        padding_mode: str = "zeros",
        groups: int = 1,
    ) -> Geometry:
        """Resolve a convolution module's options, ``padding='same'`` and ``'valid'`` included."""
        if padding == "same":
            spans = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
            pads = tuple((span // 2, span - span // 2) for span in spans)
        elif padding == "valid":
            pads = tuple((0, 0) for _ in kernel_size)
        else:
            pads = tuple((int(p), int(p)) for p in padding)
        return cls(tuple(kernel_size), tuple(stride), pads, tuple(dilation), padding_mode, groups)

    @classmethod
    def transposed(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        output_padding: Sequence[int],
        groups: int = 1,
    ) -> Geometry:
        """The geometry of a transposed convolution, as a plain convolution with the flipped kernel.

        Its pixels are ``stride`` apart, with zeros between them, and its padding is the reach of the kernel minus the
        transposed convolution's padding (Dumoulin & Visin 2016, arXiv:1603.07285, relationship 14).
        """
        ones = (1,) * len(kernel_size)
        reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        pads = tuple((r - p, r - p + extra) for r, p, extra in zip(reach, padding, output_padding, strict=True))
        return cls(tuple(kernel_size), ones, pads, tuple(dilation), "zeros", groups, tuple(stride))

    def phases(self, space: Sequence[int]) -> Iterator[Phase]:
        """The output locations of an upsampled geometry, grouped by the kernel offsets that read a pixel.

        Locations ``upsampling`` apart have the same offsets, so that each group is a plain convolution. Groups without
        offsets are left out.

        Args:
            space: The size of the input.
        """
        axes = [self._axis_phases(axis, n) for axis, n in enumerate(space)]
        for parts in itertools.product(*axes):
            pads, dilation = tuple(part.padding for part in parts), tuple(part.dilation for part in parts)
            size, ones = tuple(len(part.taps) for part in parts), (1,) * len(parts)
            offsets = []
            for index in itertools.product(*(part.taps for part in parts)):
                offset = 0
                for tap, k in zip(index, self.kernel_size, strict=True):
                    offset = offset * k + tap
                offsets.append(offset)
            yield Phase(Geometry(size, ones, pads, dilation, "zeros", self.groups), tuple(offsets))

    def _axis_phases(self, axis: int, n: int) -> list[_AxisPhase]:
        """The phases along one axis of ``n`` pixels."""
        k, d, up = self.kernel_size[axis], self.dilation[axis], self.upsampling[axis]
        before, after = self.padding[axis]
        outputs = (n - 1) * up + 1 + before + after - d * (k - 1)
        found = []
        for first in range(min(up, outputs)):
            taps = tuple(tap for tap in range(k) if (first + tap * d - before) % up == 0)
            if taps:
                # In pixels of the input: the first location's first tap, and the distance of the taps.
                start = (first + taps[0] * d - before) // up
                step = (taps[1] - taps[0]) * d // up if len(taps) > 1 else 1
                locations = (outputs - first - 1) // up + 1
                end = start + locations - 1 + step * (len(taps) - 1)
                found.append(_AxisPhase(taps, step, (-start, end - (n - 1))))
        return found

    def positions(self, space: Sequence[int]) -> int:
        """The number of output locations on an input of the given size."""
        return math.prod(self.outputs(axis, size) for axis, size in enumerate(space))

    def outputs(self, axis: int, size: int) -> int:
        """The number of output locations along one axis of an input of the given size."""
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        spread_out = (size - 1) * self.upsampling[axis] + 1 + sum(self.padding[axis])
        return (spread_out - reach - 1) // self.stride[axis] + 1


def pad(images: Tensor, geometry: Geometry) -> Tensor:
    """The images ``(examples, channels, *space)`` with the convolution's padding."""
    amounts = [amount for pair in reversed(geometry.padding) for amount in pair]
    if not any(amounts):
        return images
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(images, amounts, mode=mode)


def spread(images: Tensor, geometry: Geometry) -> Tensor:
    """The images with the zeros of the geometry's upsampling between their pixels."""
    if all(step == 1 for step in geometry.upsampling):
        return images
    size = [(n - 1) * up + 1 for n, up in zip(images.shape[2:], geometry.upsampling, strict=True)]
    apart = images.new_zeros((*images.shape[:2], *size))
    view = apart
    for axis, up in enumerate(geometry.upsampling):
        view = view.unfold(2 + axis, 1, up).squeeze(-1)
    view.copy_(images)
    return apart
