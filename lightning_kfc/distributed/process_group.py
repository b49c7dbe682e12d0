"""Collectives over a process group; no-ops in a single process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_kfc.utilities.torch_internals import norms, values_of


def initialised() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank among all; 0 without a process group."""
    return dist.get_rank() if initialised() else 0


class ProcessGroup:
    """The ranks between which a batch is split: all of them, or those of one data-parallel group.

    Args:
        group: The process group; None for all ranks.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """The number of ranks; 1 without a process group."""
        return dist.get_world_size(self.group) if initialised() else 1

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group) if initialised() else 0

    def global_rank(self, member: int) -> int:
        """The global rank of a member of the group."""
        return member if self.group is None else dist.get_global_rank(self.group, member)

    def max(self, values: Tensor) -> Tensor:
        """The maximum of each number over the group. Collective: call on every rank."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sum of each number over the group. Collective: call on every rank, with as many numbers.

        Args:
            values: This rank's numbers.
            device: A device from which the process group can send.
        """
        if self.size == 1:
            return list(values)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(sums, group=self.group)
        found: list[float] = sums.tolist()
        return found

    def all_agree(self, here: bool, device: torch.device) -> bool:
        """Whether ``here`` is true on every rank of the group. Collective: call on every rank."""
        return not bool(self.max(torch.tensor([0.0 if here else 1.0], device=device)).item())


@dataclass
class Communication:
    """Bytes of this rank's buffers in collectives; a ring moves up to twice as many for a sum.

    Attributes:
        factors: Bytes of the last refresh of factors.
        inverses: Bytes of the last refresh of inverses.
        updates: Bytes of the last step's preconditioned gradients.
        total: Bytes of all steps.
    """

    factors: int = 0
    inverses: int = 0
    updates: int = 0
    total: int = 0

    def begin(self, *what: str) -> None:
        """Reset the counts for the next refresh, or step."""
        for name in what:
            setattr(self, name, 0)

    def add(self, what: str, count: int) -> None:
        """Count the bytes of a collective."""
        setattr(self, what, getattr(self, what) + count)
        self.total += count

    def as_metrics(self) -> dict[str, float]:
        """The numbers under their names in loggers."""
        return {f"kfc/bytes_{name}": float(getattr(self, name)) for name in ("factors", "inverses", "updates")}


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    # First, since it is cheap, and almost always true: this is asked of every parameter at every step.
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def own_part(tensor: Any) -> Tensor:
    """A tensor, or this rank's part of a sharded one."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether all gradients are finite.

    Args:
        gradients: Reduced gradients, so that all ranks get the same result. With sharded ones the call is collective.
    """
    parts = [own_part(gradient) for gradient in gradients]
    dense = [values_of(gradient) for gradient in parts]
    some = [gradient for gradient in dense if gradient.numel()]
    # Both norms keep NaN and infinity. The sum of squares is far cheaper on a CPU, but may overflow.
    finite = not some or any(math.isfinite(sum(norms(some, order))) for order in (2.0, math.inf))
    if initialised() and any(map(is_sharded, gradients)):
        return ProcessGroup().all_agree(finite, gradients[0].device)
    return finite


def mean(values: Sequence[float], device: torch.device) -> list[float]:
    """The means over all ranks. Collective: call on every rank, with as many numbers.

    Args:
        values: This rank's numbers.
        device: A device from which the process group can send.
    """
    everyone = ProcessGroup()
    return [total / everyone.size for total in everyone.sum(values, device)]
