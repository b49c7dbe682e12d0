"""Sends updates from the ranks that hold an inverse to those that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.remote import Solved
from lightning_kfc.rules.base import Ready, solve

#: What became of a layer's update on the ranks that hold its inverse.
USABLE, RESTORED, FAILED = 0.0, 1.0, 2.0


def received_updates(ownership: LayerOwnership, ready: Sequence[Ready], damping: float) -> list[Ready]:
    """Have each update made by a rank that holds the inverse, and received by the others. Collective.

    Args:
        ownership: Knows which rank holds what.
        ready: The layers that are about to step.
        damping: In force at this step.

    Returns:
        The layers with their updates; as they are where every rank holds every inverse.
    """
    if ownership.replicated or not ready:
        return list(ready)
    grid, rank = ownership.placement.grid, ownership.team.rank
    ownership.communication.begin("updates")
    held = [entry for entry in ready if ownership.has_inverse(entry.layer)]
    made = dict(zip([entry.layer.name for entry in held], _updates(held, damping), strict=True))
    parcels = []
    for source in grid.receivers(rank):
        sent = [e for e in ready if grid.source(ownership.owner(e.layer) or 0, rank) == source]
        for dtype in dict.fromkeys(entry.gradient.dtype for entry in sent):
            inside = [entry for entry in sent if entry.gradient.dtype == dtype]
            sizes = [entry.gradient.numel() + 1 for entry in inside]
            flat = torch.empty(sum(sizes), dtype=dtype, device=inside[0].gradient.device)
            if source == rank:
                for entry, part in zip(inside, torch.split(flat, sizes), strict=True):
                    update, status = made[entry.layer.name]
                    part[:-1].copy_(update.reshape(-1))
                    part[-1] = status
            wait = ownership.broadcast(flat, source, grid.receivers(rank), "updates")
            parcels.append((inside, torch.split(flat, sizes), wait))
    solved = {}
    for inside, parts, wait in parcels:
        wait()
        for entry, part in zip(inside, parts, strict=True):
            solved[entry.layer.name] = _with_update(entry, part[:-1].reshape(entry.gradient.shape), part[-1])
    return [solved[entry.layer.name] for entry in ready]


def _updates(ready: Sequence[Ready], damping: float) -> list[tuple[Tensor, float]]:
    """The updates of layers whose inverses are here, before any clip, and what became of each."""
    result = solve(ready, damping, kl_clip=None)
    status = [FAILED if i in result.failed else RESTORED if i in result.restored else USABLE for i in range(len(ready))]
    return list(zip(result.updates, status, strict=True))


def _with_update(entry: Ready, update: Tensor, status: Tensor) -> Ready:
    """A layer with the update that a rank has made for all, so that all take the same way on."""
    # Looked at on the device: to ask for each status would wait for each.
    nothing = torch.full_like(update, math.nan)
    first = Solved(torch.where(status == USABLE, update, nothing))
    second = Solved(torch.where(status == FAILED, nothing, update))
    return Ready(entry.layer, entry.gradient, entry.learning_rate, first, second)
