"""What every inverse answers: factorise once in a while, solve at every step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

Factors = Mapping[str, Tensor]


class FactorisationError(ArithmeticError):
    """A factor could not be factorised, at any damping that was tried, in float64."""


class Inverse(ABC):
    """A factorised, damped curvature matrix of one layer.

    A subclass is a frozen dataclass whose fields are tensors and numbers: that is what a checkpoint holds.
    """

    name: ClassVar[str]
    #: Whether :meth:`updated` wants the gradients of single examples, for which input rows must be kept.
    wants_examples: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """Factorise: the rare, dear call.

        Args:
            factors: Factors by name, as :meth:`lightning_kfc.factors.statistics.Statistics.factors` makes them.
                A factor of two axes, ``(groups, d)``, is diagonal.
            damping: The damping in the units of the Fisher matrix, positive.

        Raises:
            FactorisationError: If no finite inverse was found.
            ValueError: If ``damping`` is not positive.
        """

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """Apply the inverse to a gradient of shape ``(groups, d_out, d_in)``: the call made each step."""

    def at_damping(self, damping: float) -> Inverse:
        """The inverse at another damping, where that costs nothing; else itself, at the one it was factorised with."""
        return self

    def for_rows(self, rows: int | None) -> Inverse:
        """This inverse for a gradient that is made of so many rows, where that can be used; else itself.

        Args:
            rows: How many; None where that is not known.
        """
        return self

    def succeeding(self, previous: Inverse | None) -> Inverse:
        """This inverse with what the one that it replaces has learnt; itself where that is nothing."""
        return self

    def in_precision(self, dtype: torch.dtype) -> Inverse:
        """This inverse, kept and applied in another precision, where its kind can be; else itself."""
        return self

    def state(self) -> dict[str, Tensor | float]:
        """The fields, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # each kind is a dataclass

    @classmethod
    def numel(cls, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number of elements that an inverse of factors of the given shapes will hold."""
        return sum(math.prod(shape) for shape in shapes.values())

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(value.nbytes for value in self.state().values() if isinstance(value, Tensor))


class StepInverse(Inverse):
    """An inverse that is made for one step, of what is there already, and is itself never factorised."""

    @classmethod
    def factorise(cls, factors: Factors, damping: float) -> Self:
        """It is not made of factors; see :class:`Inverse`.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{cls.__name__} is made for a step, not of factors")


def check_damping(damping: float) -> None:
    """Require a positive damping."""
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping!r}: the factors alone may be singular.")
