"""Where a convolution, plain or transposed, reads its input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class _AxisPhase:
    """Along one axis: output locations ``upsampling`` apart, which meet pixels at the same taps of the kernel."""

    taps: tuple[int, ...]
    dilation: int
    padding: tuple[int, int]


@dataclass(frozen=True)
class Phase:
    """Output locations of an upsampled geometry that read the same kernel offsets, as a plain convolution.

    Attributes:
        geometry: That convolution, of the input without zeros between its pixels.
        offsets: Where its kernel offsets are among those of the whole kernel, flattened.
    """

    geometry: Geometry
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads its input, in one, two or three dimensions.

    Attributes:
        kernel_size: Size per dimension.
        stride: Stride per dimension.
        padding: Padding before and after, per dimension; negative to leave pixels out.
        dilation: Dilation per dimension.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: Groups of channels.
        upsampling: Distance at which zeros put the input's pixels apart, per dimension; 1 for none.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    groups: int = 1
    upsampling: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """No upsampling is one by 1."""
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
        """Where a transposed convolution reads its input, as the plain convolution with the flipped kernel that it is.

        Zeros put the pixels ``stride`` apart, and what surrounds them is as wide as the kernel reaches, less the
        transposed convolution's own padding (Dumoulin & Visin 2016, arXiv:1603.07285, relationship 14).
        """
        ones = (1,) * len(kernel_size)
        reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        pads = tuple((r - p, r - p + extra) for r, p, extra in zip(reach, padding, output_padding, strict=True))
        return cls(tuple(kernel_size), ones, pads, tuple(dilation), "zeros", groups, tuple(stride))

    def phases(self, space: Sequence[int]) -> Iterator[Phase]:
        """The output locations of an upsampled geometry, by which of the kernel's offsets meet a pixel.

        ``upsampling`` steps on they are the same ones, so that each set is a plain convolution. Sets that meet no
        pixel are left out.

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
                # In pixels of the input: where the first location's first tap is, and how far apart the taps are.
                start = (first + taps[0] * d - before) // up
                step = (taps[1] - taps[0]) * d // up if len(taps) > 1 else 1
                locations = (outputs - first - 1) // up + 1
                end = start + locations - 1 + step * (len(taps) - 1)
                found.append(_AxisPhase(taps, step, (-start, end - (n - 1))))
        return found

    def every(self, steps: Sequence[int], offsets: Sequence[int]) -> Geometry:
        """Some steps apart along each axis, the output locations from an offset on; for zero padding.

        Args:
            steps: The distance of the locations, per axis.
            offsets: The first location, per axis.
        """
        stride = tuple(s * step for s, step in zip(self.stride, steps, strict=True))
        starts = zip(self.padding, self.stride, offsets, strict=True)
        padding = tuple((before - s * offset, after) for (before, after), s, offset in starts)
        return replace(self, stride=stride, padding=padding)

    def positions(self, space: Sequence[int]) -> int:
        """The number of output locations on an input of the given size."""
        return math.prod(self.outputs(axis, size) for axis, size in enumerate(space))

    def outputs(self, axis: int, size: int) -> int:
        """The number of output locations along one axis of an input of the given size there."""
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        spread_out = (size - 1) * self.upsampling[axis] + 1 + sum(self.padding[axis])
        return (spread_out - reach - 1) // self.stride[axis] + 1

    def without_padding(self) -> Geometry:
        """The same geometry on an input that is padded already."""
        return replace(self, padding=((0, 0),) * len(self.padding), padding_mode="zeros")


def pad(images: Tensor, geometry: Geometry) -> Tensor:
    """The images ``(examples, channels, *space)`` with the convolution's own padding applied."""
    amounts = [amount for pair in reversed(geometry.padding) for amount in pair]
    if not any(amounts):
        return images
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(images, amounts, mode=mode)


def spread(images: Tensor, geometry: Geometry) -> Tensor:
    """The images with zeros between their pixels, where the geometry asks for them."""
    if all(step == 1 for step in geometry.upsampling):
        return images
    size = [(n - 1) * up + 1 for n, up in zip(images.shape[2:], geometry.upsampling, strict=True)]
    apart = images.new_zeros((*images.shape[:2], *size))
    view = apart
    for axis, up in enumerate(geometry.upsampling):
        view = view.unfold(2 + axis, 1, up).squeeze(-1)
    view.copy_(images)
    return apart
