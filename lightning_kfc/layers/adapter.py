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

    A subclass for a module with parameters ``weight`` and ``bias`` states :meth:`weight_input_rows` and
    :meth:`output_rows`; the rest follows. Where the weight's layout is not ``(groups * d_out, ...)`` it
    also states :meth:`weight_matrix` and :meth:`weight_tensor`. Other forms of curvature than a pair of Kronecker
    factors state :meth:`record`, :meth:`statistics`, :meth:`factor_shapes` and :meth:`inverse_type`.

    Args:
        module: The module.
        options: How its statistics are taken.
    """

    #: What the coverage report calls this kind of layer.
    kind: ClassVar[str] = ""
    #: How the coverage report calls what is done with its parameters.
    treatment: ClassVar[str] = "kfc"
    #: Whether there are rows at all, which a forward must be watched for.
    has_rows: ClassVar[bool] = True
    #: Whether :meth:`input_rows` and :meth:`output_rows` of one example belong together, at a bearable cost.
    pairs_rows: ClassVar[bool] = True
    #: The factors that are means over rows (E1); the others are sums.
    mean_factors: ClassVar[frozenset[str]] = frozenset({"A"})
    #: The rows of a step that a layer is reckoned with, before any are seen.
    usual_rows: ClassVar[int] = 1024
    #: The likely reason why the parameters get a derivative although no forward of the module was seen.
    unseen: ClassVar[str] = "its weight is used without calling the module"

    def __init__(self, module: nn.Module, options: AdapterOptions | None = None) -> None:
        self.module = module
        self.options = options or AdapterOptions()
        #: How the weight is shared now.
        self.sharing = WeightSharing(self.options.weight_sharing, self.options.name)

    # Which parameters, and the shape of their joint gradient.

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """The reason why a module of this kind cannot be covered, or None where it can."""
        return None

    @classmethod
    def sublayers(cls, module: nn.Module, options: AdapterOptions) -> dict[str, Adapter]:
        """The adapters of a module, by a suffix of its name: more than one where its weights serve several ends."""
        return {"": cls(module, options)}

    @classmethod
    def held(cls, module: nn.Module) -> tuple[str, ...]:
        """Names of submodules that only hold parameters for this one, which never calls them.

        A part of the same name serves the parameters of such a submodule.
        """
        return ()

    def attach(self, hook: ForwardHook) -> RemovableHandle:
        """Have a hook called with each forward of the module that the rows are read from.

        Ahead of the user's own hooks: the layer's own output is wanted, before any of them changes it.
        """
        return self.module.register_forward_hook(hook, prepend=True, with_kwargs=True)

    @property
    def groups(self) -> int:
        """The number of groups, each with its own pair of factors."""
        return 1

    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's parameters that the rows explain, by role."""
        named = {role: parameters_of(self.module).get(role) for role in ("weight", "bias")}
        return {role: parameter for role, parameter in named.items() if parameter is not None}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of :meth:`parameters` that are trainable now; empty when all are frozen."""
        return {role: parameter for role, parameter in self.parameters().items() if parameter.requires_grad}

    def select(self, role: str, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of a tensor of its shape, that this adapter serves; a view."""
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
        """The same for parameters by role."""
        with torch.no_grad():
            # Not the parameters themselves, of which this rank may hold a part only.
            shapes = {role: torch.empty(p.shape, dtype=p.dtype, device="meta") for role, p in parameters.items()}
            groups, d_out, d_in = self.matrix(shapes).shape
        return groups, d_out, d_in

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's factors, by name, with the groups axis first; two axes say diagonal."""
        groups, d_out, d_in = self.matrix_shape()
        diagonal = self.diagonal_sides()
        return {name: (groups, d) if name in diagonal else (groups, d, d) for name, d in (("A", d_in), ("G", d_out))}

    def second_moment(self, rows: Tensor, side: str) -> Tensor:
        """The rows' second-moment total ``(groups, d, d)``, or its diagonal ``(groups, d)`` where the side has that.

        Args:
            rows: Canonical rows.
            side: ``"A"`` or ``"G"``.
        """
        return second_moment_diagonal(rows) if side in self.diagonal_sides() else second_moment_total(rows)

    def diagonal_sides(self) -> dict[str, str]:
        """The factors, by name, that are held as diagonals instead of dense, with the reason.

        A factor is, where it has more dimensions than ``max_factor_dim``; and the larger one of a pair, or of all
        pairs of a layer with several groups, that would cost more than ``lightning_kfc.factors.cost`` allows.
        """
        if self.options.max_factor_dim is None:
            return {}
        _, d_out, d_in = self.matrix_shape()
        sides = {"A": d_in, "G": d_out}
        found = {name: f"{d:,} > max_factor_dim" for name, d in sides.items() if d > self.options.max_factor_dim}
        return found or expensive_side(self.matrix_shape(), self.usual_rows, self.options)

    def approximation(self) -> str:
        """Which factors are diagonals, why, and the memory that saves; another sharing than the setting's."""
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
        """What is inverted, given the running factors; by default they themselves.

        Args:
            factors: The running factors by name.
            draws: How many independent steps' statistics are behind them.
        """
        return factors

    def inverse_type(self, chosen: type[Inverse]) -> type[Inverse]:
        """The kind of inverse that suits these factors, given the one that the user chose for Kronecker factors."""
        return chosen

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

    def input_row_chunks(self, forward: Forward, examples: int) -> Iterator[Tensor]:
        """The input rows of so many examples at a time; for rows that take far more memory than the input, override."""
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
        """What gives :meth:`project` once the derivative has arrived; made inside the forward.

        By default the products themselves, so that no activation is kept for them.

        Args:
            forward: The forward call.
            record: What :meth:`record` made of it.
            direction: Shape ``(groups, d_in)``.
        """
        products = self.project(forward, direction)
        return lambda: products

    # Statistics.

    def input_statistic(self, forward: Forward, *, reduce: bool) -> InputStatistic:
        """What one forward call adds to A; formed inside the forward, so that no activation is kept for it.

        Args:
            forward: The forward call.
            reduce: Whether the mean of an example's rows is its one row.
        """
        rows = self.input_rows(forward)
        if reduce:
            rows = share_by_reduction(rows, average=True)
        return InputStatistic(self._second_moment_of_part(rows), rows.shape[0] * rows.shape[1])

    def _second_moment_of_part(self, rows: Tensor) -> Tensor:
        """The second-moment total of rows, from a part of them where they are many, scaled to stand for all."""
        examples, positions, _, d = rows.shape
        parts = number_of_parts(examples, positions, d, self.options.rows_per_dim)
        if parts == 1:
            return self.second_moment(rows, "A")
        part = one_part(rows, parts)
        return self.second_moment(part, "A").mul_(examples * positions / part.shape[1])

    def record(self, forward: Forward) -> Any:
        """What :meth:`statistics` will need of one forward call; made inside that forward.

        By default the statistic of A, so that no activation is kept for it. With ``"reduce"``, also that of expanded
        rows, until :meth:`statistics` has compared both.
        """
        shared = self.input_statistic(forward, reduce=self.sharing.reduces)
        return BothForms(shared, self.input_statistic(forward, reduce=False)) if self.sharing.untested else shared

    def statistics(self, record: Any, output_gradient: Tensor) -> Statistics:
        """The statistics of one call, from what was recorded in the forward and the derivative at the output."""
        rows = self.output_rows(output_gradient.to(factor_dtype(output_gradient.dtype)))
        inputs, rows = self.sharing.shared(record, rows)
        return Statistics({"A": inputs.total}, {"G": self.second_moment(rows, "G")}, inputs.rows)
