r"""One sum over ranks for the statistics of all layers: flat buffers of packed triangles, filled and sent in buckets.

The loss is the mean over the W ranks, so :math:`G = (1/W)\sum G_\mathrm{rank}`. For A, totals and numbers of rows are
added.

Ranks may have statistics of different layers, after a branch of the forward or without examples. All ranks send the
same layout, with zeros for missing statistics, and a header with the present ones. So no rank waits for a message that
another rank does not send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_kfc.distributed.process_group import ProcessGroup
from lightning_kfc.factors.packing import Shape, pack, packed_numel, unpack
from lightning_kfc.factors.statistics import Statistics

#: The size at which a buffer is sent, while the next one is filled.
BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class StatisticsLayout:
    """The layout of a layer's statistics, the same on every rank.

    Attributes:
        name: The layer.
        shapes: The shapes of its statistics, by factor name.
        means: The names of statistics that are divided by a number of rows; the others are plain sums.
        dtype: Their precision.
        device: Their device.
        owner: The rank of the group that keeps the sum; None if all do.
        symmetric: Whether statistics with three axes are symmetric matrices, of which a triangle is sent.
    """

    name: str
    shapes: Mapping[str, Shape]
    means: frozenset[str]
    dtype: torch.dtype
    device: torch.device
    owner: int | None = None
    symmetric: bool = True

    def sizes(self) -> list[int]:
        """The number of each statistic's elements in a buffer."""
        return [packed_numel(shape, symmetric=self.symmetric) for shape in self.shapes.values()]

    def numel(self) -> int:
        """The number of the layer's elements in a buffer."""
        return sum(self.sizes())


@dataclass(frozen=True)
class ReducedStatistics:
    """The sum of a layer's statistics over ranks.

    Attributes:
        present: The number of ranks with statistics.
        rows: The number of rows of all ranks.
        flagged: Whether any rank raised the layer's flag.
        statistics: The sum; None on ranks that do not keep it.
    """

    present: int
    rows: float
    flagged: bool
    statistics: Statistics | None


@dataclass
class _Bucket:
    """A part of the statistics on its way.

    Attributes:
        outlines: Its layers, in order.
        flat: The packed statistics, first of this rank, later their sum over ranks.
        owner: The rank that gets the sum; None for all.
        finish: Waits for the sum and returns it, or None on ranks that do not get it.
    """

    outlines: list[StatisticsLayout]
    flat: Tensor
    owner: int | None
    finish: Callable[[], Tensor | None] = field(default=lambda: None)


class FactorReduction:
    """A sum over ranks that has begun. Collective: begin and end it on every rank, with the same outlines.

    Args:
        group: The ranks.
        outlines: The layers, in the same order on every rank.
        statistics: The statistics of this rank, by layer.
        flags: Layers whose flag this rank raises.
    """

    def __init__(
        self,
        group: ProcessGroup,
        outlines: Sequence[StatisticsLayout],
        statistics: Mapping[str, Statistics],
        flags: Iterable[str] = (),
    ) -> None:
        self._group = group
        self._outlines = list(outlines)
        flagged = set(flags)
        # float64 holds row counts below 2**53 exactly.
        header = [
            (float(o.name in statistics), statistics[o.name].rows if o.name in statistics else 0.0, o.name in flagged)
            for o in self._outlines
        ]
        self._header = torch.tensor(header, dtype=torch.float64).to(self._outlines[0].device)
        self._header_work = dist.all_reduce(self._header, group=group.group, async_op=True)
        self.bytes = self._header.nbytes
        self._buckets = []
        for bucket in _buckets(self._outlines):
            flat = torch.empty(sum(o.numel() for o in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
            for outline, part in zip(bucket, torch.split(flat, [o.numel() for o in bucket]), strict=True):
                _fill(part, outline, statistics.get(outline.name))
            self._buckets.append(self._send(_Bucket(bucket, flat, bucket[0].owner)))
            self.bytes += flat.nbytes

    def end(self) -> dict[str, ReducedStatistics]:
        """Wait for the sums, and return them; they are equal on all ranks that keep them."""
        self._header_work.wait()
        header = {o.name: row for o, row in zip(self._outlines, self._header.tolist(), strict=True)}
        sums: dict[str, Statistics] = {}
        for bucket in self._buckets:
            flat = bucket.finish()
            if flat is None:
                continue
            parts = torch.split(flat, [o.numel() for o in bucket.outlines])
            for outline, part in zip(bucket.outlines, parts, strict=True):
                sums[outline.name] = _read(part, outline, header[outline.name][1], self._group.size)
        return {
            name: ReducedStatistics(int(present), rows, flagged > 0, sums.get(name) if present else None)
            for name, (present, rows, flagged) in header.items()
        }

    def _send(self, bucket: _Bucket) -> _Bucket:
        group, flat, owner = self._group.group, bucket.flat, bucket.owner
        if owner is None:
            work = dist.all_reduce(flat, group=group, async_op=True)
            bucket.finish = lambda: _waited(work, flat)
        else:
            work = dist.reduce(flat, self._group.global_rank(owner), group=group, async_op=True)
            kept = flat if owner == self._group.rank else None
            bucket.finish = lambda: _waited(work, kept)
        return bucket


def _buckets(outlines: Sequence[StatisticsLayout]) -> Iterable[list[StatisticsLayout]]:
    """Groups of layers in order, with equal precision, device and owner, until a buffer is full."""
    kinds: dict[Any, list[StatisticsLayout]] = {}
    for outline in outlines:
        kinds.setdefault((outline.dtype, outline.device, outline.owner), []).append(outline)
    for alike in kinds.values():
        bucket: list[StatisticsLayout] = []
        size = 0
        for outline in alike:
            own = outline.numel() * outline.dtype.itemsize
            if bucket and size + own > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(outline)
            size += own
        yield bucket


def _fill(part: Tensor, outline: StatisticsLayout, statistics: Statistics | None) -> None:
    if statistics is None:
        part.zero_()
        return
    totals = {**statistics.means, **statistics.sums}
    for name, piece in zip(outline.shapes, torch.split(part, outline.sizes()), strict=True):
        pack(totals[name], piece, symmetric=outline.symmetric)


def _read(part: Tensor, outline: StatisticsLayout, rows: float, ranks: int) -> Statistics:
    pieces = dict(zip(outline.shapes, torch.split(part, outline.sizes()), strict=True))
    for name in pieces.keys() - outline.means:
        pieces[name].div_(ranks)
    totals = {
        name: unpack(piece, shape, symmetric=outline.symmetric)
        for (name, shape), piece in zip(outline.shapes.items(), pieces.values(), strict=True)
    }
    means = {name: total for name, total in totals.items() if name in outline.means}
    return Statistics(means, {name: total for name, total in totals.items() if name not in means}, rows)


def _waited(work: Any, result: Tensor | None) -> Tensor | None:
    work.wait()
    return result
