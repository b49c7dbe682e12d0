"""Patches of convolution inputs as rows, and their second moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kfc.factors.lagged import lagged_second_moment
from lightning_kfc.factors.statistics import homogeneous_total, second_moment_total, share_by_reduction

#: At most this many bytes of patches are materialised at once.
PATCH_BYTES = 64 * 2**20


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


def patch_rows(images: Tensor, geometry: Geometry) -> Tensor:
    """The patches of images, one row per output location, in the order of ``torch.nn.functional.unfold``.

    Args:
        images: Inputs of the convolution, shape ``(examples, channels, *space)``.
        geometry: Where the convolution reads them.

    Returns:
        Shape ``(examples, positions, groups, channels / groups * prod(kernel_size))``.
    """
    windows = pad(spread(images, geometry), geometry)
    for axis, (size, step, dilation) in enumerate(
        zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    ):
        windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    examples, channels = windows.shape[:2]
    n = len(geometry.kernel_size)
    positions = windows.shape[2 : 2 + n].numel()
    order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
    depth = channels // geometry.groups * torch.Size(geometry.kernel_size).numel()
    return windows.permute(order).reshape(examples, positions, geometry.groups, depth)


def patch_chunks(images: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """The rows of :func:`patch_rows` a few examples at a time, at most ``PATCH_BYTES`` of them at once."""
    taps = torch.Size(geometry.kernel_size).numel()
    numel = geometry.positions(images.shape[2:]) * images.shape[1] * taps
    size = max(1, PATCH_BYTES // max(1, numel * images.element_size()))
    for chunk in torch.split(images, size):
        yield patch_rows(chunk, geometry)


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
    if not reduce and _lags_serve(images, geometry):
        return _second_moment_by_lags(images, geometry, homogeneous=homogeneous)
    return _second_moment_by_patches(images, geometry, homogeneous=homogeneous, reduce=reduce)


def _lags_serve(images: Tensor, geometry: Geometry) -> bool:
    """Whether the form without patches applies, and saves anything.

    With a stride, few pairs of kernel offsets share their products; the patches of a single channel are small.
    """
    return (
        len(geometry.kernel_size) <= 2
        and set(geometry.stride) == set(geometry.upsampling) == {1}
        and min(min(pair) for pair in geometry.padding) >= 0
        and geometry.groups == 1
        and images.shape[1] > 1
        and max(geometry.kernel_size) > 1
    )


def _second_moment_by_lags(images: Tensor, geometry: Geometry, *, homogeneous: bool) -> tuple[Tensor, int]:
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        images, padding = pad(images, geometry), tuple((0, 0) for _ in padding)
    kernel_size, dilation = geometry.kernel_size, geometry.dilation
    if len(kernel_size) == 1:
        images = images.unsqueeze(2)
        kernel_size, dilation, padding = (1, *kernel_size), (1, *dilation), ((0, 0), *padding)
    total, rows = lagged_second_moment(images, kernel_size, dilation, padding)
    total = total.unsqueeze(0)
    if homogeneous:
        plane = Geometry(kernel_size, (1, 1), padding, dilation, "zeros", 1, (1, 1))
        row_sum = patch_rows(images.sum(0, keepdim=True), plane).sum((0, 1))
        total = homogeneous_total(total, row_sum, rows)
    return total, rows


def _second_moment_by_patches(
    images: Tensor, geometry: Geometry, *, homogeneous: bool, reduce: bool
) -> tuple[Tensor, int]:
    total: Tensor | None = None
    row_sum: Tensor | None = None
    rows = 0
    for patches in patch_chunks(images, geometry):
        chunk = share_by_reduction(patches, average=True) if reduce else patches
        part = second_moment_total(chunk)
        total = part if total is None else total + part
        rows += chunk.shape[0] * chunk.shape[1]
        if homogeneous:
            column = chunk.sum((0, 1))
            row_sum = column if row_sum is None else row_sum + column
    assert total is not None  # split() yields at least one chunk
    if row_sum is not None:
        total = homogeneous_total(total, row_sum, rows)
    return total, rows


def patch_second_moment_diagonal(
    images: Tensor, geometry: Geometry, *, homogeneous: bool, reduce: bool = False
) -> tuple[Tensor, int]:
    """The diagonal of :func:`patch_second_moment`, shape ``(groups, d)``, and R."""
    if reduce:
        total = torch.stack([chunk.mean(1).square().sum(0) for chunk in patch_chunks(images, geometry)]).sum(0)
        rows = len(images)
    else:
        # A patch's squares are the patch of the squares, and patches add up: those of one image stand for all.
        squares = patch_rows(images.square().sum(0, keepdim=True), geometry)
        total = squares.sum((0, 1))
        rows = len(images) * squares.shape[1]
    if homogeneous:
        total = torch.cat([total, total.new_full((total.shape[0], 1), rows)], dim=1)
    return total, rows
