"""The interface of inverses: ``factorise`` at a refresh, ``solve`` at every step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar, Self

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]


class FactorisationError(ArithmeticError):
    """A factor has no factorisation at any tried damping, in float64."""


class Inverse(ABC):
    """A factorised, damped curvature matrix of one layer.

    A subclass is a frozen dataclass whose fields are tensors and numbers; a checkpoint holds them.
    """

    name: ClassVar[str]
    #: Whether the inverse uses gradients of single examples, which require the layers' input rows.
    wants_examples: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Factorise: an expensive call, made at refreshes.

        Args:
            factors: Factors by name, as from :meth:`lightning_kfc.factors.statistics.Statistics.factors`.
                A factor of two axes, ``(groups, d)``, is diagonal.
            damping: The damping in the units of the Fisher matrix, positive.

        Raises:
            FactorisationError: If no finite inverse was found.
            ValueError: If ``damping`` is not positive.
        """

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """Apply the inverse to a gradient of shape ``(groups, d_out, d_in)``, at every step."""

    def with_damping(self, damping: float) -> Inverse:
        """The inverse with another damping; itself if the damping is part of the factorisation."""
        return self

    def for_low_rank(self, rows: int | None) -> Inverse:
        """A faster form for a gradient that is the sum of few rows' outer products; else itself.

        Args:
            rows: The number of rows; None if unknown.
        """
        return self

    def continuing_from(self, previous: Inverse | None) -> Inverse:
        """This inverse with the state of the one that it replaces; itself without such state."""
        return self

    def in_precision(self, dtype: torch.dtype) -> Inverse:
        """This inverse in another precision; itself if its kind has only one."""
        return self

    def state(self) -> dict[str, Tensor | float]:
        """The fields, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # each kind is a dataclass

    @classmethod
    def numel(cls, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number of elements of an inverse of factors of the given shapes."""
        return sum(math.prod(shape) for shape in shapes.values())

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(value.nbytes for value in self.state().values() if isinstance(value, Tensor))


class StepInverse(Inverse):
    """An inverse that is never factorised: for one step made from another one, or on another rank."""

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Not available; see :class:`Inverse`.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{cls.__name__} is not made from factors")
