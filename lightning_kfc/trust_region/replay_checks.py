"""Check on all ranks that the losses of a step are reproduced by replays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.trust_region.losses_seen import SeenLoss
from lightning_kfc.trust_region.snapshot import StepSnapshot, replayed
from lightning_kfc.trust_region.tape import Tape

#: The largest error of a replay with unmoved weights, as a share of the loss.
REPLAY_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Replayability:
    """Whether the losses of a step can be replayed; equal on all ranks.

    Attributes:
        refused: The reason why no recording can be replayed; empty if recordings can.
        missed: The reason why the losses of this step cannot be replayed; empty if they can.
        any_recorded: Whether any rank has a recorded loss; a loss of exactly 0 is a multiple of no recorded one.
        with_collectives: Whether the losses of some rank depend on data of other ranks.
    """

    refused: str = ""
    missed: str = ""
    any_recorded: bool = True
    with_collectives: bool = False


def replayability(tape: Tape | None, losses: Sequence[SeenLoss], device: torch.device) -> Replayability:
    """Check whether all ranks can replay their losses. Collective: call on every rank.

    Args:
        tape: The last recording, or None.
        losses: The losses of the step.
        device: A device from which the process group can send.
    """
    refusal = tape.refusal if tape is not None else None
    known = [seen.recorded for seen in losses if seen.recorded is not None]
    unknown = any(seen.recorded is None and float(seen.value) != 0 for seen in losses)
    stale = any(recorded.is_stale() for recorded in known)
    missing = refusal is None and (not losses or unknown or stale)
    needs_collectives = any(recorded.needs_collectives for recorded in known)
    refused, missed, any_recorded, with_collectives = _any_rank(
        device, refusal is not None, missing, bool(known), needs_collectives
    )
    if refused:
        return Replayability(refused=refusal or "the forward of another rank cannot be replayed")
    if missed:
        return Replayability(
            missed="the losses of the step were computed outside the recorded training step, or their inputs "
            "have changed since"
        )
    return Replayability(any_recorded=any_recorded, with_collectives=with_collectives)


def replay_error(
    losses: Sequence[SeenLoss], values: Mapping[int, Tensor], device: torch.device, *, with_collectives: bool
) -> str:
    """Why a replay with unmoved weights differs from the losses; empty if it does not.

    Collective: call on every rank.

    Args:
        losses: The losses of the step.
        values: Replacements of parameters, by the parameter's ``id``.
        device: A device from which the process group can send.
        with_collectives: Whether to run also collectives that no loss depends on.
    """
    own, reason = sum(float(seen.value) for seen in losses), ""
    try:
        again = replayed(losses, values, with_collectives=with_collectives)
        # A rank whose loss is exactly 0 has none to replay.
        tolerance = max([REPLAY_TOLERANCE, *(4 * torch.finfo(seen.value.dtype).eps for seen in losses)])
        if not abs(again - own) <= tolerance * abs(own):
            reason = f"a replay with the same weights gives the loss {again:.9g} instead of {own:.9g}"
    except Exception as error:
        reason = str(error) or type(error).__name__
    (failed,) = _any_rank(device, bool(reason))
    return (reason or "the replay of another rank does not reproduce its loss") if failed else ""


def replayed_step(before: StepSnapshot, device: torch.device) -> tuple[float, float, str]:
    """The losses before and after a step, means over ranks, and the error of a failed replay. Collective.

    Args:
        before: The snapshot before the step.
        device: A device from which the process group can send.
    """
    loss_after, error = math.nan, ""
    try:
        loss_after = before.replay()
    except Exception as raised:
        # Fails, for example, on sizes that depend on the weights.
        error = str(raised) or type(raised).__name__
    # After a failure too: the other ranks wait for this rank's loss.
    loss_before, loss_after, failed = distributed.mean([before.loss, loss_after, float(bool(error))], device)
    return loss_before, loss_after, (error or "another rank could not replay its loss") if failed else ""


def _any_rank(device: torch.device, *facts: bool) -> list[bool]:
    """Whether each fact holds on any rank. Collective: call on every rank."""
    return [share > 0 for share in distributed.mean([float(fact) for fact in facts], device)]
