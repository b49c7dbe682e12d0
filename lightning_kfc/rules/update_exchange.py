"""Send updates from the ranks that hold an inverse to those that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum

import torch
from torch import Tensor

from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.remote import ReceivedUpdate
from lightning_kfc.rules.base import ReadyLayer
from lightning_kfc.rules.natural import NaturalRule, forget_rows


class UpdateStatus(IntEnum):
    """Outcome of a layer's update, sent after the update's last element."""

    USABLE = 0
    #: Only the previous inverse gave a usable update.
    RESTORED = 1
    FAILED = 2


def received_updates(ownership: LayerOwnership, ready: Sequence[ReadyLayer], damping: float) -> list[ReadyLayer]:
    """Compute each update where the inverse is held, and send it to other ranks.

    Collective: call on every rank.

    Args:
        ownership: The ranks that hold each inverse.
        ready: The layers of the step.
        damping: The damping in force at this step.

    Returns:
        The layers with their updates; unchanged if every rank holds every inverse.
    """
    if ownership.replicated or not ready:
        return list(ready)
    grid, rank = ownership.placement.grid, ownership.group.rank
    ownership.communication.begin("updates")
    held = [entry for entry in ready if ownership.has_inverse(entry.layer)]
    made = dict(zip([entry.layer.name for entry in held], _own_updates(held, damping), strict=True))
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


def _own_updates(ready: Sequence[ReadyLayer], damping: float) -> list[tuple[Tensor, UpdateStatus]]:
    """The updates before the clip, with their outcomes, for layers whose inverses this rank holds."""
    updates = NaturalRule().updates(ready, damping, kl_clip=None)
    forget_rows(ready, updates)
    status = [UpdateStatus.USABLE] * len(ready)
    for position in updates.restored:
        status[position] = UpdateStatus.RESTORED
    for position in updates.failed:
        status[position] = UpdateStatus.FAILED
    return list(zip(updates.tensors, status, strict=True))


def _with_update(entry: ReadyLayer, update: Tensor, status: Tensor) -> ReadyLayer:
    """A layer with the update of its owner, so that all ranks decide alike."""
    # On the device: a read of each status on the CPU would wait for the device.
    unusable = torch.full_like(update, math.nan)
    first = ReceivedUpdate(torch.where(status == UpdateStatus.USABLE, update, unusable))
    second = ReceivedUpdate(torch.where(status == UpdateStatus.FAILED, unusable, update))
    return replace(entry, received=first, fallback=second)
