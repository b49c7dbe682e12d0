"""Zero-debiased exponential running averages of factors, stored as triangles between refreshes.

Factors are symmetric, so that their lower triangles are enough (:mod:`~lightning_kfc.factors.packing`). Factors of less
than 128 dimensions are stored whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.factors.packing import Shape, pack, packed_numel, unpack


@dataclass(frozen=True)
class RunningAverage:
    r"""A debiased exponential average.

    After k updates with decay :math:`\rho` it equals
    :math:`\sum_j \rho^{k-j}(1-\rho) F_j / (1-\rho^k)`, without an initial value (the debiasing of Adam, Kingma & Ba
    2015).

    Attributes:
        value: The average, already debiased.
        weight: :math:`1-\rho^k`, the total weight of the updates before debiasing.
        squares: The sum of the squared shares of the updates in ``value``.
    """

    value: Tensor
    weight: float
    squares: float = 1.0

    @classmethod
    def start(cls, value: Tensor, decay: float) -> RunningAverage:
        """The average after its first update."""
        return cls(value, 1.0 - decay)

    def updated(self, value: Tensor, decay: float) -> RunningAverage:
        """The average after one more update."""
        weight = decay * self.weight + (1.0 - decay)
        share = (1.0 - decay) / weight
        return RunningAverage(self.value.lerp(value, share), weight, (1.0 - share) ** 2 * self.squares + share**2)

    @property
    def draws(self) -> float:
        """The number of independent, equally weighted updates whose mean has the same noise."""
        return 1.0 / self.squares


@dataclass(frozen=True)
class StoredAverage:
    """A factor's running average, kept as its triangle.

    Attributes:
        average: The average of the triangles.
        shape: The factor's shape.
    """

    average: RunningAverage
    shape: Shape

    @classmethod
    def start(cls, value: Tensor, decay: float) -> StoredAverage:
        """The average after its first update."""
        return cls.of(RunningAverage.start(value, decay))

    @classmethod
    def of(cls, average: RunningAverage) -> StoredAverage:
        """Pack an average of whole factors."""
        return cls(replace(average, value=_packed(average.value)), tuple(average.value.shape))

    def updated(self, value: Tensor, decay: float) -> StoredAverage:
        """The average after one more update."""
        return replace(self, average=self.average.updated(_packed(value), decay))

    @property
    def value(self) -> Tensor:
        """The whole factor: a new tensor, or a view for a factor that is stored whole."""
        triangle = self.average.value
        return triangle.view(self.shape) if _is_whole(self.shape) else unpack(triangle, self.shape)

    @property
    def draws(self) -> float:
        """The number of independent, equally weighted updates whose mean has the same noise."""
        return self.average.draws

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.average.value.nbytes


def average_state(averages: Mapping[str, StoredAverage]) -> dict[str, dict[str, Any]]:
    """Running factors as plain tensors, numbers and lists; factors as triangles."""
    return {
        name: {
            "triangle": own_storage(a.average.value),
            "shape": list(a.shape),
            "weight": a.average.weight,
            "squares": a.average.squares,
        }
        for name, a in averages.items()
    }


def averages_of(state: Mapping[str, Any], like: Tensor) -> dict[str, StoredAverage]:
    """Running factors from the result of :func:`average_state`, or from whole factors of earlier versions.

    Args:
        state: The state.
        like: A tensor with the wanted device and precision.
    """
    return {name: _average_of(entry, like) for name, entry in state.items()}


def shapes_in(state: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of the factors in a state."""
    return {name: tuple(e["shape"] if "shape" in e else e["value"].shape) for name, e in state.items()}


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its storage is larger: a checkpoint would hold the whole storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.contiguous().clone()


def _average_of(entry: Mapping[str, Any], like: Tensor) -> StoredAverage:
    numbers = float(entry["weight"]), float(entry["squares"])
    if "triangle" not in entry:
        return StoredAverage.of(RunningAverage(entry["value"].to(like), *numbers))
    return StoredAverage(RunningAverage(entry["triangle"].to(like), *numbers), tuple(entry["shape"]))


def stored_nbytes(shape: Shape, dtype: torch.dtype) -> int:
    """Stored bytes of a factor of a shape."""
    return packed_numel(shape) * dtype.itemsize


def _is_whole(shape: Shape) -> bool:
    return packed_numel(shape) == math.prod(shape)


def _packed(value: Tensor) -> Tensor:
    """The flat triangle, or the flat tensor if the triangle is no smaller."""
    shape = tuple(value.shape)
    if _is_whole(shape):
        return value.reshape(-1)
    triangle = value.new_empty(packed_numel(shape))
    pack(value, triangle)
    return triangle
