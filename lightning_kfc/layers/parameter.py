"""Parameters without rows of a layer: gates, position embeddings, weights of functional calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_kfc.factors.inverses import DiagonalInverse, Inverse
from lightning_kfc.factors.sparse import dense, overwrite
from lightning_kfc.factors.statistics import Statistics, factor_dtype
from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import Forward


class ParameterAdapter(Adapter):
    r"""A diagonal Fisher estimate of one parameter, from the derivative of the seeds with respect to it.

    Sampled seeds of different terms are independent and of mean 0, so the expected square of the summed derivative is
    the diagonal of :math:`\sum_i c_i J_i^\top H_i J_i`; derivatives of single examples are not needed.

    One step gives one such square for each coordinate. A coordinate with small draws would look flat and take a step
    that is far too large, so the tensor's mean counts as one more draw: :math:`(\bar f + n f)/(1 + n)` is inverted,
    n being the number of draws in the running average f (1 at first, 9 in the end at the default decay). A single
    number has no neighbours to average with; damping and KL clip bound its step. ``docs/decisions`` holds the
    measurement.

    Args:
        module: The module that owns the parameter.
        name: The parameter's name in the module.
    """

    kind = "Parameter"
    treatment: ClassVar[str] = "diagonal"
    has_rows: ClassVar[bool] = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.name = name

    def parameters(self) -> dict[str, nn.Parameter]:
        """The one parameter."""
        parameter = getattr(self.module, self.name, None)
        return {} if parameter is None else {self.name: parameter}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """All elements as one row, ``(1, 1, numel)``."""
        return dense(tensors[self.name]).reshape(1, 1, -1)

    def write(self, matrix: Tensor, into: Mapping[str, Tensor]) -> None:
        """See :class:`Adapter`."""
        overwrite(into[self.name], matrix.reshape(into[self.name].shape))

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The diagonal."""
        return {"F": (1, self.matrix_shape()[2])}

    def diagonal_sides(self) -> dict[str, str]:
        """Empty: the curvature is a diagonal already."""
        return {}

    def estimate(self, factors: Mapping[str, Tensor], draws: float) -> Mapping[str, Tensor]:
        """The diagonal, with the tensor's mean as one more draw."""
        diagonal = factors["F"]
        return {"F": (diagonal.mean() + draws * diagonal) / (1 + draws)}

    def inverse_type(self, chosen: type[Inverse]) -> type[Inverse]:
        """The inverse of diagonals."""
        return DiagonalInverse

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """A parameter without a module call has no rows."""
        raise NotImplementedError("a single parameter has no rows")

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """A parameter without a module call has no rows."""
        raise NotImplementedError("a single parameter has no rows")

    def statistics(self, record: Any, output_gradient: Tensor) -> Statistics:
        """The square of the derivative with respect to the parameter itself."""
        gradient = output_gradient.to(factor_dtype(output_gradient.dtype)).reshape(1, -1)
        return Statistics({}, {"F": gradient.square()}, 0)
