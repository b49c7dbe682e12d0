"""What every layer kind answers: its canonical rows, and its gradient as one matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_kfc.factors.statistics import (
    InputStatistic,
    Statistics,
    append_ones,
    factor_dtype,
    second_moment_total,
    share_by_reduction,
)


@dataclass(frozen=True)
class Forward:
    """The inputs of one call of a module's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def first(self, name: str = "input") -> Tensor:
        """The first input, given by position or by ``name``."""
        value = self.args[0] if self.args else self.kwargs[name]
        assert isinstance(value, Tensor)
        return value


class Adapter(ABC):
    r"""Translates between one module and canonical rows.

    The module's gradient must be :math:`\nabla\bar W = \sum_r g_r \bar a_r^\top` over its rows, for each
    group: input rows ``(examples, positions, groups, d_in)``, output rows
    ``(examples, positions, groups, d_out)``, gradient ``(groups, d_out, d_in)`` with the bias as last column.

    A subclass for a module with parameters ``weight`` and ``bias`` states :meth:`weight_input_rows` and
    :meth:`output_rows`; the rest follows. Where the weight's layout is not ``(groups * d_out, ...)`` it
    also states :meth:`weight_matrix` and :meth:`weight_tensor`.

    Args:
        module: The module.
        weight_sharing: ``"expand"``: one row per use of the weight; ``"reduce"``: one row per example.
    """

    #: What the coverage report calls this kind of layer.
    kind: ClassVar[str] = ""

    def __init__(self, module: nn.Module, weight_sharing: str = "expand") -> None:
        self.module = module
        self.weight_sharing = weight_sharing

    # Which parameters, and the shape of their joint gradient.

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """The reason why a module of this kind cannot be covered, or None where it can."""
        return None

    @property
    def groups(self) -> int:
        """The number of groups, each with its own pair of factors."""
        return 1

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The module's trainable parameters that the rows explain, by name; empty when all are frozen."""
        own = {name: getattr(self.module, name, None) for name in ("weight", "bias")}
        return {name: p for name, p in own.items() if isinstance(p, nn.Parameter) and p.requires_grad}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One matrix ``(groups, d_out, d_in)`` from tensors shaped as :meth:`own_parameters`."""
        parts = []
        if "weight" in tensors:
            parts.append(self.weight_matrix(tensors["weight"]))
        if "bias" in tensors:
            parts.append(tensors["bias"].reshape(self.groups, -1, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`matrix`."""
        own = self.own_parameters()
        result = {}
        if "bias" in own:
            result["bias"] = matrix[..., -1].reshape(own["bias"].shape)
        if "weight" in own:
            columns = matrix[..., :-1] if "bias" in own else matrix
            result["weight"] = self.weight_tensor(columns, own["weight"].shape)
        return result

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as ``(groups, d_out, columns)``."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight_tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`weight_matrix`."""
        return matrix.reshape(shape)

    def matrix_shape(self) -> tuple[int, int, int]:
        """``(groups, d_out, d_in)``."""
        with torch.no_grad():
            own = {name: p.to("meta") for name, p in self.own_parameters().items()}
            groups, d_out, d_in = self.matrix(own).shape
        return groups, d_out, d_in

    # Rows.

    @abstractmethod
    def weight_input_rows(self, forward: Forward) -> Tensor:
        """The input rows that multiply the weight, without the bias's 1, ``(examples, positions, groups, columns)``."""

    @abstractmethod
    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """The rows of a derivative at the module's output, ``(examples, positions, groups, d_out)``."""

    def input_rows(self, forward: Forward) -> Tensor:
        """The input rows in homogeneous form, for the parameters that are trainable now."""
        rows = self.weight_input_rows(forward)
        rows = rows.to(factor_dtype(rows.dtype))
        own = self.own_parameters()
        if "weight" not in own:
            return rows.new_ones((*rows.shape[:3], 1))
        return append_ones(rows) if "bias" in own else rows

    def project(self, forward: Forward, direction: Tensor) -> Tensor:
        """Input rows times one direction ``(groups, d_in)``: shape ``(examples, positions, groups)``."""
        return torch.einsum("ntgi,gi->ntg", self.input_rows(forward), direction)

    # Statistics.

    def input_statistic(self, forward: Forward) -> InputStatistic:
        """What one forward call adds to A; formed inside the forward, so that no activation is kept for it."""
        rows = self.input_rows(forward)
        if self.weight_sharing == "reduce":
            rows = share_by_reduction(rows, average=True)
        return InputStatistic(second_moment_total(rows), rows.shape[0] * rows.shape[1])

    def statistics(self, inputs: InputStatistic, output_gradient: Tensor) -> Statistics:
        """The statistics of one call: A's part from the forward, G's from the derivative at the output."""
        rows = self.output_rows(output_gradient.to(factor_dtype(output_gradient.dtype)))
        if self.weight_sharing == "reduce":
            rows = share_by_reduction(rows, average=False)
        return Statistics({"A": inputs.total}, {"G": second_moment_total(rows)}, inputs.rows)
