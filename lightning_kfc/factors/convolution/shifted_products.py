r"""The second moment of stride-1 patches without patches.

The block of A for the kernel offsets (i, j) and (i', j') is the sum, over output locations, of products of two pixels
at the lag (i' - i, j' - j). Offsets with equal lags sum the same products, except for border rows and columns that
only some of them reach. So one product of C x C blocks per lag, over the whole image, and small products over the
borders give A exactly: :math:`((2k_1-1)(2k_2-1)+1)/2` products instead of :math:`(k_1 k_2)^2`, for 3 x 3 13 instead of
81.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Bytes of images at a time, so that the operands of a lag's product stay in a core's cache.
CHUNK_BYTES = 2**20

#: Cost of copying a number, in multiply-adds of a matrix product.
COPY_COST = 8


@dataclass(frozen=True)
class _Axis:
    """One spatial axis, with the pixels that each kernel offset reads.

    Attributes:
        size: The number of pixels.
        taps: The kernel size.
        dilation: The distance of neighbouring offsets.
        before: The zero padding before the first pixel.
        outputs: The number of output locations.
    """

    size: int
    taps: int
    dilation: int
    before: int
    outputs: int

    def excluded(self, lag: int) -> tuple[list[int], Tensor]:
        """The pixels that some offset does not read as the first of a pair ``lag`` offsets apart (lag >= 0).

        Returns:
            The pixels, and for each offset and pixel a 1 if the offset does not read the pixel, else 0.
        """
        firsts = [i * self.dilation - self.before for i in range(self.taps - lag)]
        pairs = self.size - lag * self.dilation
        pixels = [y for y in range(max(pairs, 0)) if any(y < first or y >= first + self.outputs for first in firsts)]
        outside = [[float(y < first or y >= first + self.outputs) for y in pixels] for first in firsts]
        return pixels, torch.tensor(outside).reshape(len(firsts), len(pixels))


def lagged_second_moment(
    images: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> tuple[Tensor, int]:
    r"""The total :math:`\sum_r a_r a_r^\top` over the patches of a two-dimensional, stride-1, zero-padded convolution.

    Args:
        images: Shape ``(examples, channels, height, width)``, without the padding.
        kernel_size: Height and width of the kernel.
        dilation: Distance of the kernel's offsets, per axis.
        padding: Zero padding before and after, per axis.

    Returns:
        The total, shape ``(d, d)`` with d = channels * kernel height * kernel width in the order of
        ``torch.nn.functional.unfold``, and the number of patches.
    """
    examples, channels = images.shape[:2]
    axes = [
        _Axis(size, taps, step, before, size + before + after - step * (taps - 1))
        for size, taps, step, (before, after) in zip(images.shape[2:], kernel_size, dilation, padding, strict=True)
    ]
    vertical, horizontal = axes
    k1, k2 = kernel_size
    # Offsets first, so that blocks are contiguous when written; one pass at the end reorders them.
    total = images.new_zeros((k1, k2, k1, k2, channels, channels))
    lags = [(dy, dx) for dy in range(k1) for dx in range(-k2 + 1 if dy else 0, k2)]
    whole = _sums_over_images(images, [(dy * dilation[0], dx * dilation[1]) for dy, dx in lags])
    borders = _Borders(images, vertical, horizontal)
    for (dy, dx), sums in zip(lags, whole, strict=True):
        blocks = sums - borders.sums(dy, dx)
        left, right = slice(max(0, -dx), k2 - max(0, dx)), slice(max(0, dx), k2 - max(0, -dx))
        upper, lower = slice(0, k1 - dy), slice(dy, k1)
        _blocks_at(total[upper, left, lower, right]).copy_(blocks.permute(2, 3, 0, 1))
        if (dy, dx) != (0, 0):
            _blocks_at(total[lower, right, upper, left]).copy_(blocks.permute(3, 2, 0, 1))
    d = channels * k1 * k2
    return total.permute(4, 0, 1, 5, 2, 3).reshape(d, d), examples * vertical.outputs * horizontal.outputs


def _blocks_at(total: Tensor) -> Tensor:
    """The view ``(C, C, offsets down, offsets across)`` of the diagonal of a slice of A: pairs at the same lag."""
    return total.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)


def _pairs(images: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Two views of channels-last images whose pixels are ``(dy, dx)`` apart, dy >= 0."""
    height, width = images.shape[1:3]
    if dy >= height or abs(dx) >= width:
        return images[:, :0], images[:, :0]
    first = images[:, : height - dy, max(0, -dx) : width - max(0, dx)]
    second = images[:, dy:, max(0, dx) : width - max(0, -dx)]
    return first, second


def _product(first: Tensor, second: Tensor) -> Tensor:
    """The sum of outer products over all but the last axis."""
    return first.reshape(-1, first.shape[-1]).T @ second.reshape(-1, second.shape[-1])


def _sums_over_images(images: Tensor, lags: list[tuple[int, int]]) -> list[Tensor]:
    """For each lag, the sum over all pairs of pixels at that lag, both inside the image."""
    by_lag = _sums_of_crops if _cropping_is_cheaper(images, lags) else _sums_of_flat_images
    totals: list[Tensor] = []
    for chunk in _chunks(images):
        sums = by_lag(chunk, lags)
        totals = sums if not totals else [total.add_(part) for total, part in zip(totals, sums, strict=True)]
    return totals


def _chunks(images: Tensor) -> Iterator[Tensor]:
    bytes_per_image = max(1, images[:1].numel() * images.element_size())
    yield from torch.split(images, max(1, CHUNK_BYTES // bytes_per_image))


def _reach(lags: list[tuple[int, int]]) -> tuple[int, int]:
    return max(dy for dy, _ in lags), max(abs(dx) for _, dx in lags)


def _cropping_is_cheaper(images: Tensor, lags: list[tuple[int, int]]) -> bool:
    """Whether copies of the cropped images are cheaper than products with zeros between images."""
    channels, height, width = images.shape[1:]
    down, across = _reach(lags)
    flat = channels * (height + down) * (width + across) * len(lags)
    kept = sum(max(height - dy, 0) * max(width - abs(dx), 0) for dy, dx in lags)
    return (channels + 2 * COPY_COST) * kept < flat


def _sums_of_crops(images: Tensor, lags: list[tuple[int, int]]) -> list[Tensor]:
    channels_last = images.permute(0, 2, 3, 1).contiguous()
    return [_product(*_pairs(channels_last, dy, dx)) for dy, dx in lags]


def _sums_of_flat_images(images: Tensor, lags: list[tuple[int, int]]) -> list[Tensor]:
    """Sums over all images as one line of pixels, with zeros between rows and between images.

    A lag is then a shift of the line. Pairs across a row's end contain a zero, since there are as many zeros as the
    longest lag.
    """
    down, across = _reach(lags)
    line = F.pad(images, (0, across, 0, down)).permute(0, 2, 3, 1)
    width = line.shape[2]
    line = line.reshape(-1, images.shape[1])
    shifts = [dy * width + dx for dy, dx in lags]
    return [line[: len(line) - shift].T @ line[shift:] for shift in shifts]


class _Borders:
    """Sums over pairs of pixels near the borders, which not every kernel offset reads.

    Args:
        images: Shape ``(examples, channels, height, width)``.
        vertical: The rows.
        horizontal: The columns.
    """

    def __init__(self, images: Tensor, vertical: _Axis, horizontal: _Axis) -> None:
        self._images = images
        self._vertical, self._horizontal = vertical, horizontal
        down, across = range(vertical.taps), range(-horizontal.taps + 1, horizontal.taps)
        # Of two opposite lags one is enough: (0, dx) with dx >= 0.
        self._rows = {
            dy: self._strips(images, vertical, dy, horizontal, across if dy else range(horizontal.taps)) for dy in down
        }
        mirrored = images.transpose(2, 3)
        self._columns = {
            dx: self._strips(mirrored, horizontal, dx, vertical, down if dx >= 0 else down[1:]) for dx in across
        }

    def sums(self, dy: int, dx: int) -> Tensor:
        """For each pair of first offsets, the sum over the pairs ``(dy, dx)`` apart that they do not read.

        Returns:
            Shape ``(offsets down, offsets across, C, C)``, or a shape that broadcasts to it.
        """
        by_row, rows = self._rows[dy]
        by_column, columns = self._columns[dx]
        channels = self._images.shape[1]
        result = self._images.new_zeros((by_row.shape[0], by_column.shape[0], channels, channels))
        if by_row.shape[1]:
            result += torch.einsum("ir,rab->iab", by_row, rows[dx]).unsqueeze(1)
        if by_column.shape[1]:
            result += torch.einsum("jc,cab->jab", by_column, columns[dy]).unsqueeze(0)
        if by_row.shape[1] and by_column.shape[1]:
            result -= torch.einsum("ir,jc,rcab->ijab", by_row, by_column, self._corners(dy, dx))
        return result

    @staticmethod
    def _strips(
        images: Tensor, across: _Axis, lag: int, along: _Axis, lags_along: range
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The border lines of one direction, and their products with the lines ``lag`` offsets away.

        Args:
            images: Shape ``(examples, C, lines, length)``.
            across: The axis of the lines.
            lag: In offsets; negative if the first pixel of a pair is the farther one.
            along: The axis along a line.
            lags_along: The wanted lags along the line, in offsets.

        Returns:
            For each first offset and border line a 1 if the offset does not read it, ``(offsets, lines)``, and by lag
            along the line the products, ``(lines, C, C)``.
        """
        places, outside = across.excluded(abs(lag))
        outside = outside.to(images)
        if not places:
            return outside, {}
        ahead = [place + abs(lag) * across.dilation for place in places]
        # Zeros between the lines of different examples, so that a lag is one shift of all lines.
        reach = (along.taps - 1) * along.dilation
        first = _lines(images, places, reach).flatten(1, 2)
        second = first if lag == 0 else _lines(images, ahead, reach).flatten(1, 2)
        if lag < 0:
            first, second = second, first
        return outside, {step: _shifted_products(first, second, step * along.dilation) for step in lags_along}

    def _corners(self, dy: int, dx: int) -> Tensor:
        """Products of the border pixels of both directions, ``(rows, columns, C, C)``."""
        down, across = dy * self._vertical.dilation, abs(dx) * self._horizontal.dilation
        rows, columns = self._vertical.excluded(dy)[0], self._horizontal.excluded(abs(dx))[0]
        ahead = [column + across for column in columns]
        first = _lines(self._images, rows)[:, :, columns if dx >= 0 else ahead]
        second = _lines(self._images, [row + down for row in rows])[:, :, ahead if dx >= 0 else columns]
        return torch.einsum("rnca,rncb->rcab", first, second)


def _lines(images: Tensor, places: list[int], gap: int = 0) -> Tensor:
    """Some lines of images ``(examples, C, lines, length)``, as ``(lines, examples, length + gap, C)``, zeros last."""
    examples, channels, _, length = images.shape
    lines = images.new_empty((len(places), examples, length + gap, channels))
    for line, place in zip(lines, places, strict=True):
        line[:, :length].copy_(images.select(2, place).transpose(1, 2))
    lines[:, :, length:].zero_()
    return lines


def _shifted_products(first: Tensor, second: Tensor, shift: int) -> Tensor:
    """Sums of outer products of rows ``(lines, rows, C)``, the second ones ``shift`` rows ahead: ``(lines, C, C)``."""
    rows = first.shape[1]
    first = first[:, max(0, -shift) : rows - max(0, shift)]
    return first.mT @ second[:, max(0, shift) : rows - max(0, -shift)]
