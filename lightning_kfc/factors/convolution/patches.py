"""Patches of convolution inputs as rows, and their second moment."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kfc.factors.convolution.geometry import Geometry, pad, spread
from lightning_kfc.factors.convolution.shifted_products import lagged_second_moment
from lightning_kfc.factors.row_sampling import offsets, steps_along_axes
from lightning_kfc.factors.statistics import gram, homogeneous_total

#: Most bytes of patches at once; more would exceed a processor's cache, and be slower.
PATCH_BYTES = 16 * 2**20
#: Most parts of one phase of an upsampled convolution, which has few rows.
MOST_PARTS_OF_A_PHASE = 4


def patch_windows(images: Tensor, geometry: Geometry) -> Tensor:
    """The patch of every output location, ``(examples, channels, *positions, *kernel_size)``; a view if possible."""
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
        geometry: The convolution's geometry.

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

    Neighbouring pixels are contiguous in this layout, so that making and multiplying it is several times faster, most
    of all with many groups.
    """
    return _columns(patch_windows(images, geometry), geometry)


def _columns(windows: Tensor, geometry: Geometry) -> Tensor:
    examples, channels = windows.shape[:2]
    n = len(geometry.kernel_size)
    order = (1, *range(2 + n, 2 + 2 * n), 0, *range(2, 2 + n))
    depth = channels // geometry.groups * torch.Size(geometry.kernel_size).numel()
    return windows.permute(order).reshape(geometry.groups, depth, examples, windows.shape[2 : 2 + n].numel())


def project_patches(images: Tensor, geometry: Geometry, direction: Tensor) -> Tensor:
    """The patches of :func:`patch_rows` times one direction, computed as a convolution with one filter per group.

    Args:
        images: Inputs of the convolution, shape ``(examples, channels, *space)``.
        geometry: The convolution's geometry.
        direction: Shape ``(groups, channels / groups * prod(kernel_size))``.

    Returns:
        Shape ``(examples, positions, groups)``.
    """
    padded = pad(spread(images, geometry), geometry)
    kernel = direction.reshape(geometry.groups, images.shape[1] // geometry.groups, *geometry.kernel_size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel_size) - 1]
    found = convolve(padded, kernel, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    return found.flatten(2).transpose(1, 2)


def image_chunks(images: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Chunks of examples whose patches take at most ``PATCH_BYTES``."""
    taps = torch.Size(geometry.kernel_size).numel()
    numel = geometry.positions(images.shape[2:]) * images.shape[1] * taps
    yield from torch.split(images, max(1, PATCH_BYTES // max(1, numel * images.element_size())))


def patch_second_moment(
    images: Tensor, geometry: Geometry, *, homogeneous: bool, reduce: bool = False
) -> tuple[Tensor, int]:
    r"""The total :math:`\sum_r a_r a_r^\top` over all patches, and their number R.

    Args:
        images: Inputs of the convolution, shape ``(examples, channels, *space)``.
        geometry: The convolution's geometry.
        homogeneous: Whether rows have a trailing 1, for a bias.
        reduce: Whether an example has a single row, the mean of its patches.

    Returns:
        The total, shape ``(groups, d, d)``, and R.
    """
    if not reduce and any(up > 1 for up in geometry.upsampling):
        return _second_moment_by_phases(images, geometry, homogeneous=homogeneous)
    if not reduce and _lags_serve(images, geometry):
        return _second_moment_by_lags(images, geometry, homogeneous=homogeneous)
    return _second_moment_by_patches(images, geometry, homogeneous=homogeneous, reduce=reduce)


def part_of_patch_second_moment(
    images: Tensor, geometry: Geometry, parts: int, *, homogeneous: bool
) -> tuple[Tensor, int]:
    r"""The same as :func:`patch_second_moment`, estimated from one part of the patches (``factors/row_sampling.py``).

    Args:
        images: Inputs of the convolution, shape ``(examples, channels, *space)``.
        geometry: The convolution's geometry.
        parts: The number of parts; with upsampling at most ``MOST_PARTS_OF_A_PHASE`` for each phase.
        homogeneous: Whether rows have a trailing 1, for a bias.

    Returns:
        The total, shape ``(groups, d, d)``, scaled to all patches, and their number.
    """
    if any(up > 1 for up in geometry.upsampling):
        return _second_moment_by_phases(
            images, geometry, homogeneous=homogeneous, parts=min(parts, MOST_PARTS_OF_A_PHASE)
        )
    space = images.shape[2:]
    rows = len(images) * geometry.positions(space)
    windows = patch_windows(images, geometry)
    steps = steps_along_axes(parts, windows.shape[2 : 2 + len(space)])
    parts = math.prod(steps)
    taken = []
    for j, offset in enumerate(offsets(steps)):
        locations = (slice(first, None, step) for first, step in zip(offset, steps, strict=True))
        taken.append(_columns(windows[slice(j, None, parts), :, *locations], geometry).flatten(2))
    columns = torch.cat(taken, -1)
    total = gram(columns).mul_(rows / columns.shape[-1])
    if homogeneous:
        total = homogeneous_total(total, columns.sum(-1).mul_(rows / columns.shape[-1]), rows)
    return total, rows


def part_is_cheaper(geometry: Geometry, parts: int, images: Tensor) -> bool:
    """Whether a part by patches takes fewer multiply-adds than all rows by lags, if lags apply."""
    if not _lags_serve(images, geometry):
        return True
    lags = math.prod(2 * size - 1 for size in geometry.kernel_size)
    return bool(parts * lags > math.prod(geometry.kernel_size) ** 2)


def _second_moment_by_phases(
    images: Tensor, geometry: Geometry, *, homogeneous: bool, parts: int = 1
) -> tuple[Tensor, int]:
    """The total over output locations that read the same kernel offsets, and zeros at the others, at a time."""
    groups, depth = geometry.groups, images.shape[1] // geometry.groups
    taps = torch.Size(geometry.kernel_size).numel()
    total = images.new_zeros((groups, depth * taps, depth * taps))
    row_sum = images.new_zeros((groups, depth * taps))
    for phase in geometry.phases(images.shape[2:]):
        if parts > 1:
            part, _ = part_of_patch_second_moment(images, phase.geometry, parts, homogeneous=True)
        else:
            part, _ = patch_second_moment(images, phase.geometry, homogeneous=True)
        offsets = torch.tensor(phase.offsets, device=images.device)
        at = (torch.arange(depth, device=images.device)[:, None] * taps + offsets).flatten()
        total[:, at[:, None], at] += part[:, :-1, :-1]
        row_sum[:, at] += part[:, :-1, -1]
    rows = len(images) * geometry.positions(images.shape[2:])
    return homogeneous_total(total, row_sum, rows) if homogeneous else total, rows


def _lags_serve(images: Tensor, geometry: Geometry) -> bool:
    """Whether the form without patches applies, and is faster.

    It is not with a stride, where few pairs of kernel offsets share their products, or with a single channel.
    """
    return (
        len(geometry.kernel_size) <= 2
        and set(geometry.stride) == {1}
        and geometry.groups == 1
        and images.shape[1] > 1
        and max(geometry.kernel_size) > 1
    )


def _second_moment_by_lags(images: Tensor, geometry: Geometry, *, homogeneous: bool) -> tuple[Tensor, int]:
    padding = geometry.padding
    if geometry.padding_mode != "zeros" or any(amount < 0 for pair in padding for amount in pair):
        images, padding = pad(images, geometry), tuple((0, 0) for _ in padding)
    kernel_size, dilation = geometry.kernel_size, geometry.dilation
    if len(kernel_size) == 1:
        images = images.unsqueeze(2)
        kernel_size, dilation, padding = (1, *kernel_size), (1, *dilation), ((0, 0), *padding)
    total, rows = lagged_second_moment(images, kernel_size, dilation, padding)
    total = total.unsqueeze(0)
    if homogeneous:
        plane = Geometry(kernel_size, (1, 1), padding, dilation)
        row_sum = patch_rows(images.sum(0, keepdim=True), plane).sum((0, 1))
        total = homogeneous_total(total, row_sum, rows)
    return total, rows


def _second_moment_by_patches(
    images: Tensor, geometry: Geometry, *, homogeneous: bool, reduce: bool
) -> tuple[Tensor, int]:
    total: Tensor | None = None
    row_sum: Tensor | None = None
    rows = 0
    for chunk in image_chunks(images, geometry):
        columns = patch_columns(chunk, geometry)
        columns = columns.mean(-1) if reduce else columns.flatten(2)
        part = gram(columns)
        total = part if total is None else total + part
        rows += columns.shape[-1]
        if homogeneous:
            column = columns.sum(-1)
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
        means = [patch_rows(chunk, geometry).mean(1) for chunk in image_chunks(images, geometry)]
        total = torch.cat(means).square().sum(0)
        rows = len(images)
    else:
        # The patches of the summed squares are the summed squares of the patches.
        windows = patch_windows(images.square().sum(0, keepdim=True), geometry)[0]
        n = len(geometry.kernel_size)
        # From the view, since the patches of one large image may not fit into memory.
        total = windows.sum(tuple(range(1, 1 + n))).reshape(geometry.groups, -1)
        rows = len(images) * windows.shape[1 : 1 + n].numel()
    if homogeneous:
        total = torch.cat([total, total.new_full((total.shape[0], 1), rows)], dim=1)
    return total, rows
