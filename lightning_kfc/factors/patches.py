"""Patches of convolution inputs as rows, and their second moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kfc.factors.statistics import homogeneous_total

#: At most this many bytes of patches are materialised at once; more would leave a processor's cache, and be slower.
PATCH_BYTES = 16 * 2**20


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
    padding_mode: str
    groups: int
    upsampling: tuple[int, ...]

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
        ones = (1,) * len(pads)
        return cls(tuple(kernel_size), tuple(stride), pads, tuple(dilation), padding_mode, groups, ones)

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

    def positions(self, space: Sequence[int]) -> int:
        """The number of output locations on an input of the given size."""
        count = 1
        for n, k, s, (before, after), d, up in zip(
            space, self.kernel_size, self.stride, self.padding, self.dilation, self.upsampling, strict=True
        ):
            count *= ((n - 1) * up + 1 + before + after - d * (k - 1) - 1) // s + 1
        return count


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


def patch_windows(images: Tensor, geometry: Geometry) -> Tensor:
    """What every output location reads, ``(examples, channels, *positions, *kernel_size)``; a view where it can be."""
    windows = pad(spread(images, geometry), geometry)
    for axis, (size, step, dilation) in enumerate(
        zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    ):
        windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    return windows


def patch_rows(images: Tensor, geometry: Geometry) -> Tensor:
    """The patches of images, one row per output location, in the order of ``torch.nn.functional.unfold``.

    Args:
        images: Inputs of the convolution, shape ``(examples, channels, *space)``.
        geometry: Where the convolution reads them.

    Returns:
        Shape ``(examples, positions, groups, channels / groups * prod(kernel_size))``.
    """
    windows = patch_windows(images, geometry)
    examples, channels = windows.shape[:2]
    n = len(geometry.kernel_size)
    positions = windows.shape[2 : 2 + n].numel()
    order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
    depth = channels // geometry.groups * torch.Size(geometry.kernel_size).numel()
    return windows.permute(order).reshape(examples, positions, geometry.groups, depth)


def patch_columns(images: Tensor, geometry: Geometry) -> Tensor:
    """The patches of :func:`patch_rows` as columns, ``(groups, depth, examples, positions)``.

    Neighbouring pixels stay neighbours in this layout: it is made, and multiplied with itself, several times faster,
    most of all with many groups.
    """
    windows = patch_windows(images, geometry)
    examples, channels = windows.shape[:2]
    n = len(geometry.kernel_size)
    order = (1, *range(2 + n, 2 + 2 * n), 0, *range(2, 2 + n))
    depth = channels // geometry.groups * torch.Size(geometry.kernel_size).numel()
    return windows.permute(order).reshape(geometry.groups, depth, examples, windows.shape[2 : 2 + n].numel())


def image_chunks(images: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """A few examples at a time, so that at most ``PATCH_BYTES`` of patches are materialised at once."""
    taps = torch.Size(geometry.kernel_size).numel()
    numel = geometry.positions(images.shape[2:]) * images.shape[1] * taps
    yield from torch.split(images, max(1, PATCH_BYTES // max(1, numel * images.element_size())))


def patch_second_moment(
    images: Tensor, geometry: Geometry, *, homogeneous: bool, reduce: bool = False
) -> tuple[Tensor, int]:
    r"""The total :math:`\sum_r a_r a_r^\top` over all patches, and their number R.

    Args:
        images: Inputs of the convolution, shape ``(examples, channels, *space)``.
        geometry: Where the convolution reads them.
        homogeneous: Whether rows carry a trailing 1, for a bias.
        reduce: Whether the mean of an example's patches is its one row.

    Returns:
        The total, shape ``(groups, d, d)``, and R.
    """
    total: Tensor | None = None
    row_sum: Tensor | None = None
    rows = 0
    for chunk in image_chunks(images, geometry):
        columns = patch_columns(chunk, geometry)
        columns = columns.mean(-1) if reduce else columns.flatten(2)
        part = columns @ columns.transpose(1, 2)
        total = part if total is None else total + part
        rows += columns.shape[-1]
        if homogeneous:
            column = columns.sum(-1)
            row_sum = column if row_sum is None else row_sum + column
    assert total is not None  # split() yields at least one chunk
    if row_sum is not None:
        total = homogeneous_total(total, row_sum, rows)
    return total, rows


def patch_second_moment_diagonal(images: Tensor, geometry: Geometry, *, homogeneous: bool) -> tuple[Tensor, int]:
    """The diagonal of :func:`patch_second_moment`, shape ``(groups, d)``, and R.

    A patch's squares are the patch of the squares, and patches add up: those of one image stand for all.
    """
    squares = patch_rows(images.square().sum(0, keepdim=True), geometry)
    rows = images.shape[0] * squares.shape[1]
    total = squares.sum((0, 1))
    if homogeneous:
        total = torch.cat([total, total.new_full((total.shape[0], 1), rows)], dim=1)
    return total, rows
