"""Sums over ranks of a torch.distributed process group; without one, nothing happens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_kfc.factors.statistics import Statistics


def world_size() -> int:
    """The number of ranks; 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no gradient holds a NaN or an infinity; sparse ones are looked at as they are.

    Args:
        gradients: What the ranks have reduced already, so that all of them give the same answer.
    """
    dense = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    # The largest magnitude keeps NaN and infinity, and unlike a sum of squares does not itself overflow.
    norm = torch.nn.utils.get_total_norm([gradient for gradient in dense if gradient.numel()], math.inf)
    return bool(torch.isfinite(norm))


def mean(values: Sequence[float], device: torch.device) -> list[float]:
    """The means over ranks, the same on each of them.

    Args:
        values: As many on every rank.
        device: One that the process group can send from.
    """
    if world_size() == 1:
        return list(values)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(sums)
    return [float(value) / world_size() for value in sums.tolist()]


def reduce_statistics(statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    r"""Statistics of the whole batch from those of each rank's part.

    The loss is the mean over the W ranks, so :math:`G = (1/W)\sum G_\mathrm{rank}`, while totals and numbers of rows
    behind A add up (KFC.md sec. 6). Every rank must name the same layers in the same order.

    Args:
        statistics: This rank's statistics by layer.
    """
    ranks = world_size()
    if ranks == 1 or not statistics:
        return dict(statistics)
    parts: list[Tensor] = []
    for entry in statistics.values():
        parts += [*entry.means.values(), *entry.sums.values()]
    # A row count is whole and below 2**53, which float64 holds exactly.
    counts = torch.tensor([entry.rows for entry in statistics.values()], dtype=torch.float64, device=parts[0].device)
    flat = torch.cat([part.reshape(-1).to(parts[0].dtype) for part in parts])
    dist.all_reduce(flat)
    dist.all_reduce(counts)
    pieces = iter(torch.split(flat, [part.numel() for part in parts]))
    reduced = {}
    for (name, entry), rows in zip(statistics.items(), counts.tolist(), strict=True):
        means = {key: next(pieces).reshape(total.shape).to(total.dtype) for key, total in entry.means.items()}
        sums = {key: next(pieces).reshape(total.shape).to(total.dtype) / ranks for key, total in entry.sums.items()}
        reduced[name] = Statistics(means, sums, rows)
    return reduced
