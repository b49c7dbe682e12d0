"""The interface of adapters: canonical rows, and the gradient as one matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_kfc.factors.inverses import Inverse
from lightning_kfc.factors.row_sampling import number_of_parts, one_part
from lightning_kfc.factors.statistics import (
    InputStatistic,
    Statistics,
    append_ones,
    factor_dtype,
    second_moment_diagonal,
    second_moment_total,
    share_by_reduction,
)
from lightning_kfc.layers.expensive_factors import expensive_side
from lightning_kfc.layers.forward import Forward, ForwardHook, Probe
from lightning_kfc.layers.options import AdapterOptions
from lightning_kfc.layers.weight_sharing import BothForms, WeightSharing
from lightning_kfc.utilities.torch_internals import parameters_of


class Adapter(ABC):
    r"""Translates between one module and canonical rows.

    The module's gradient must be :math:`\nabla\bar W = \sum_r g_r \bar a_r^\top` over its rows, for each
    group: input rows ``(examples, positions, groups, d_in)``, output rows
    ``(examples, positions, groups, d_out)``, gradient ``(groups, d_out, d_in)`` with the bias as last column.

    A subclass for a module with parameters ``weight`` and ``bias`` defines :meth:`weight_input_rows` and
    :meth:`output_rows`. If the weight's layout is not ``(groups * d_out, ...)``, it also defines
    :meth:`weight_matrix` and :meth:`weight_tensor`. Curvature other than a pair of Kronecker factors takes
    :meth:`record`, :meth:`statistics`, :meth:`factor_shapes` and :meth:`inverse_type`.

    Args:
        module: The module.
        options: The options of its statistics.
    """

    #: The name of this kind of layer in the coverage report.
    kind: ClassVar[str] = ""
    #: The name of its parameters' treatment in the coverage report.
    treatment: ClassVar[str] = "kfc"
    #: Whether the layer has rows, for which forwards are recorded.
    has_rows: ClassVar[bool] = True
    #: Whether one example's :meth:`input_rows` and :meth:`output_rows` match, at an affordable cost.
    pairs_rows: ClassVar[bool] = True
    #: The factors that are means over rows (E1); the others are sums.
    mean_factors: ClassVar[frozenset[str]] = frozenset({"A"})
    #: The assumed number of rows of a step, before any is recorded.
    usual_rows: ClassVar[int] = 1024
    #: The likely reason for a derivative of the parameters without a forward of the module.
    unseen: ClassVar[str] = "its weight is used without calling the module"

    def __init__(self, module: nn.Module, options: AdapterOptions | None = None) -> None:
        self.module = module
        self.options = options or AdapterOptions()
        #: The present weight sharing.
        self.sharing = WeightSharing(self.options.weight_sharing, self.options.name)
        self._matrix_shapes: dict[tuple[tuple[str, torch.Size], ...], tuple[int, int, int]] = {}

    # Which parameters, and the shape of their joint gradient.

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """The reason why a module of this kind cannot be covered; None if it can."""
        return None

    @classmethod
    def sublayers(cls, module: nn.Module, options: AdapterOptions) -> dict[str, Adapter]:
        """The adapters of a module, by a suffix of its name: several for a module with several products."""
        return {"": cls(module, options)}

    @classmethod
    def held(cls, module: nn.Module) -> tuple[str, ...]:
        """Names of submodules that hold parameters of this module, and are never called.

        The adapter of :meth:`sublayers` with the same name covers these parameters.
        """
        return ()

    def attach(self, hook: ForwardHook) -> RemovableHandle:
        """Call a hook with each forward of the module that has the rows.

        The hook runs before the user's own hooks, which may change the layer's output.
        """
        return self.module.register_forward_hook(hook, prepend=True, with_kwargs=True)

    @property
    def groups(self) -> int:
        """The number of groups, each with its own pair of factors."""
        return 1

    def parameters(self) -> dict[str, nn.Parameter]:
        """The covered parameters of the module, by role."""
        own = parameters_of(self.module)
        return {role: parameter for role in ("weight", "bias") if (parameter := own.get(role)) is not None}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones of :meth:`parameters`; empty when all are frozen."""
        return {role: parameter for role, parameter in self.parameters().items() if parameter.requires_grad}

    def select(self, role: str, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of a tensor of its shape, that this adapter covers; a view."""
        return tensor

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One matrix ``(groups, d_out, d_in)`` from tensors with the shapes of the parameters, by role."""
        parts = []
        if "weight" in tensors:
            parts.append(self.weight_matrix(self.select("weight", tensors["weight"])))
        if "bias" in tensors:
            parts.append(self.select("bias", tensors["bias"]).reshape(self.groups, -1, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def write(self, matrix: Tensor, into: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`matrix`: fill tensors with the shapes of the parameters."""
        if "bias" in into:
            bias = self.select("bias", into["bias"])
            bias.copy_(matrix[..., -1].reshape(bias.shape))
        if "weight" in into:
            weight = self.select("weight", into["weight"])
            columns = matrix[..., :-1] if "bias" in into else matrix
            weight.copy_(self.weight_tensor(columns, weight.shape))

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as ``(groups, d_out, columns)``."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight_tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`weight_matrix`."""
        return matrix.reshape(shape)

    def matrix_shape(self) -> tuple[int, int, int]:
        """``(groups, d_out, d_in)`` for the parameters that are trainable now, or for all where none is."""
        return self.matrix_shape_of(self.own_parameters() or self.parameters())

    def matrix_shape_of(self, parameters: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """``(groups, d_out, d_in)`` for parameters by role."""
        key = tuple((role, parameter.shape) for role, parameter in parameters.items())
        if key not in self._matrix_shapes:
            # This rank may hold only a part of the parameters themselves.
            shapes = {role: torch.empty(shape, device="meta") for role, shape in key}
            with torch.no_grad():
                groups, d_out, d_in = self.matrix(shapes).shape
            self._matrix_shapes[key] = groups, d_out, d_in
        return self._matrix_shapes[key]

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's factors, by name, with the groups axis first; a diagonal has two axes."""
        groups, d_out, d_in = self.matrix_shape()
        diagonal = self.diagonal_sides()
        return {name: (groups, d) if name in diagonal else (groups, d, d) for name, d in (("A", d_in), ("G", d_out))}

    def second_moment(self, rows: Tensor, side: str) -> Tensor:
        """The rows' second-moment total ``(groups, d, d)``, or its diagonal ``(groups, d)`` for a diagonal side.

        Args:
            rows: Canonical rows.
            side: ``"A"`` or ``"G"``.
        """
        return second_moment_diagonal(rows) if side in self.diagonal_sides() else second_moment_total(rows)

    def diagonal_sides(self) -> dict[str, str]:
        """The factors, by name, that are held as diagonals, with the reason.

        A factor is a diagonal if it has more dimensions than ``max_factor_dim``. The larger factor of a pair, or of
        all pairs of a layer with several groups, is a diagonal if it would exceed the bounds of
        ``lightning_kfc.factors.cost``.
        """
        if self.options.max_factor_dim is None:
            return {}
        _, d_out, d_in = self.matrix_shape()
        sides = {"A": d_in, "G": d_out}
        found = {name: f"{d:,} > max_factor_dim" for name, d in sides.items() if d > self.options.max_factor_dim}
        return found or expensive_side(self.matrix_shape(), self.usual_rows, self.options)

    def approximation(self) -> str:
        """The diagonal factors with reason and saved memory, and a weight sharing other than the setting's."""
        groups, d_out, d_in = self.matrix_shape()
        reasons = self.diagonal_sides()
        itemsize = factor_dtype(next(iter(self.parameters().values())).dtype).itemsize
        # The factor, and an inverse of the same size.
        saved = sum(2 * groups * d * (d - 1) * itemsize for name, d in (("A", d_in), ("G", d_out)) if name in reasons)
        sides = [f"{name} diagonal: {reason}" for name, reason in reasons.items()]
        size = f"{saved / 1e9:,.2f} GB" if saved >= 1e8 else f"{saved / 1e6:.1f} MB"
        cheaper = f"{', '.join(sides)} (saves {size})" if reasons else ""
        return "; ".join(text for text in (self.sharing.reason, cheaper) if text)

    def estimate(self, factors: Mapping[str, Tensor], draws: float) -> Mapping[str, Tensor]:
        """The factors to invert, from the running factors; by default these themselves.

        Args:
            factors: The running factors by name.
            draws: The number of independent steps in the running average.
        """
        return factors

    def inverse_type(self, chosen: type[Inverse]) -> type[Inverse]:
        """The kind of inverse for these factors, given the user's choice for Kronecker factors."""
        return chosen

    # Rows.

    @abstractmethod
    def weight_input_rows(self, forward: Forward) -> Tensor:
        """The rows that multiply the weight, without the bias's 1, ``(examples, positions, groups, columns)``."""

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

    def input_row_chunks(self, forward: Forward, examples: int) -> Iterator[Tensor]:
        """The input rows, ``examples`` at a time; override where rows take far more memory than the input."""
        yield from torch.split(self.input_rows(forward), examples)

    def project(self, forward: Forward, direction: Tensor) -> Tensor:
        """Input rows times one direction ``(groups, d_in)``: shape ``(examples, positions, groups)``."""
        rows = self.input_rows(forward)
        if rows.shape[2:] != direction.shape:
            raise ValueError(
                f"{type(self).__name__}.weight_input_rows() made rows of shape {tuple(rows.shape)}, the bias's 1 "
                f"included; the gradient needs (examples, positions, {', '.join(map(str, direction.shape))})."
            )
        return torch.einsum("ntgi,gi->ntg", rows, direction.to(rows))

    def probe(self, forward: Forward, record: Any, direction: Tensor) -> Probe:
        """A function that returns :meth:`project` in the backward; made inside the forward.

        By default it holds the products, so that no activation is kept.

        Args:
            forward: The forward call.
            record: The result of :meth:`record`.
            direction: Shape ``(groups, d_in)``.
        """
        products = self.project(forward, direction)
        return lambda: products

    # Statistics.

    def input_statistic(self, forward: Forward, *, reduce: bool) -> InputStatistic:
        """The addition of one forward call to A; formed inside the forward, so that no activation is kept.

        Args:
            forward: The forward call.
            reduce: Whether an example has one row, the mean of its rows.
        """
        rows = self.input_rows(forward)
        if reduce:
            rows = share_by_reduction(rows, average=True)
        return InputStatistic(self._second_moment_of_part(rows), rows.shape[0] * rows.shape[1])

    def _second_moment_of_part(self, rows: Tensor) -> Tensor:
        """The second-moment total of rows; of many rows, a part is taken and scaled."""
        examples, positions, _, d = rows.shape
        parts = number_of_parts(examples, positions, d, self.options.rows_per_dim)
        if parts == 1:
            return self.second_moment(rows, "A")
        part = one_part(rows, parts)
        return self.second_moment(part, "A").mul_(examples * positions / part.shape[1])

    def record(self, forward: Forward) -> Any:
        """The record of one forward call for :meth:`statistics`; made inside the forward.

        By default the statistic of A, so that no activation is kept. With ``"reduce"``, the record also holds the
        statistic of expanded rows, until :meth:`statistics` has compared both.
        """
        shared = self.input_statistic(forward, reduce=self.sharing.reduces)
        return BothForms(shared, self.input_statistic(forward, reduce=False)) if self.sharing.untested else shared

    def statistics(self, record: Any, output_gradient: Tensor) -> Statistics:
        """The statistics of one call, from its record and the derivative at its output."""
        rows = self.output_rows(output_gradient.to(factor_dtype(output_gradient.dtype)))
        inputs, rows = self.sharing.shared(record, rows)
        return Statistics({"A": inputs.total}, {"G": self.second_moment(rows, "G")}, inputs.rows)
