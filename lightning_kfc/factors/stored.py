"""Running factors as they are kept between refreshes: as triangles, in the precision and the place that are asked for.

A factor is read where an inverse is refreshed, once in many steps, and is symmetric: half of it is enough
(:mod:`~lightning_kfc.factors.packing`; small ones, of less than 128 dimensions, stay whole). No number changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.factors.packing import Shape, pack, packed_numel, unpack
from lightning_kfc.factors.running import RunningAverage

#: How factors may be kept: on their layer's device as they are; rounded to bfloat16; in the memory of the CPU.
STORAGES = ("full", "bfloat16", "cpu")


@dataclass(frozen=True)
class StoredAverage:
    """A factor's running average, kept as its triangle.

    Attributes:
        average: The average of the triangles, as it is kept.
        shape: The factor's shape.
        dtype: The precision in which it is given.
        device: Where it is given.
        storage: One of :data:`STORAGES`.
    """

    average: RunningAverage
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    storage: str

    @classmethod
    def start(cls, value: Tensor, decay: float, storage: str = "full") -> StoredAverage:
        """The average after its first update, which is that update itself."""
        return cls.of(RunningAverage.start(value, decay), storage)

    @classmethod
    def of(cls, average: RunningAverage, storage: str = "full") -> StoredAverage:
        """Keep an average of whole factors."""
        value = average.value
        triangle = replace(average, value=_packed(value))
        return cls(_stored(triangle, storage), tuple(value.shape), value.dtype, value.device, storage)

    def updated(self, value: Tensor, decay: float) -> StoredAverage:
        """The average after one more update."""
        fresh = self._given().updated(_packed(value), decay)
        return replace(self, average=_stored(fresh, self.storage))

    @property
    def value(self) -> Tensor:
        """The whole factor: a new tensor, but for a small one that is kept as it is given."""
        triangle = self._given().value
        return triangle.view(self.shape) if _is_whole(self.shape) else unpack(triangle, self.shape)

    @property
    def weight(self) -> float:
        """The mass behind the average."""
        return self.average.weight

    @property
    def squares(self) -> float:
        """The sum of the squares of the shares that the updates have in it."""
        return self.average.squares

    @property
    def draws(self) -> float:
        """How many independent updates, equally weighted, would leave as much noise in their mean."""
        return self.average.draws

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.average.value.nbytes

    def _given(self) -> RunningAverage:
        return replace(self.average, value=self.average.value.to(self.device, self.dtype))


def average_state(averages: Mapping[str, StoredAverage]) -> dict[str, dict[str, Any]]:
    """Running factors in plain tensors and numbers."""
    return {name: {"value": a.value, "weight": a.weight, "squares": a.squares} for name, a in averages.items()}


def averages_of(state: Mapping[str, Any], device: torch.device, storage: str) -> dict[str, StoredAverage]:
    """Running factors from what :func:`average_state` gave."""
    return {
        name: StoredAverage.of(
            RunningAverage(entry["value"].to(device), float(entry["weight"]), float(entry["squares"])), storage
        )
        for name, entry in state.items()
    }


def stored_nbytes(shape: Shape, dtype: torch.dtype, storage: str = "full") -> int:
    """Bytes that a factor of a shape will take."""
    return packed_numel(shape) * (torch.bfloat16 if storage == "bfloat16" else dtype).itemsize


def _is_whole(shape: Shape) -> bool:
    return packed_numel(shape) == math.prod(shape)


def _packed(value: Tensor) -> Tensor:
    """The triangle, flat; the tensor itself where that is no smaller."""
    shape = tuple(value.shape)
    if _is_whole(shape):
        return value.reshape(-1)
    triangle = value.new_empty(packed_numel(shape))
    pack(value, triangle)
    return triangle


def _stored(average: RunningAverage, storage: str) -> RunningAverage:
    if storage == "bfloat16":
        return replace(average, value=average.value.to(torch.bfloat16))
    return replace(average, value=average.value.cpu()) if storage == "cpu" else average
