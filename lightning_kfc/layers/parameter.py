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

    Sampled seeds of different terms are independent and of mean 0, so that the expected square of the summed
    derivative is the diagonal of :math:`\sum_i c_i J_i^\top H_i J_i` itself: no example's own derivative is needed.

    One step is a single such square for each coordinate, though, with one degree of freedom: a coordinate whose draws
    were small looks flat, and would take a step far too large. So the tensor's mean counts as one draw more:
    :math:`(\bar f + n f)/(1 + n)` is inverted, n the draws behind the running average f, 1 at first and 39 in the
    end at its default decay. A single number has no such neighbours; it has the damping and the KL clip.

    Measured by ``benchmarks/accuracy/parameter_rule.py``: steps to a training loss on real digits at lr = 0.5, the
    median of five seeds and the worst, for a transformer whose position embeddings, scales and gates are raw, an LSTM
    without an adapter, a perceptron whose weights functional calls use, and a net with a raw scale on its logits::

                             transformer  LSTM       perceptron  scale
        f alone              190 (never)  105 (105)  60 (85)     80 (110)
        (mean + n f)/(1+n)   130 (175)     95 (110)  65 (75)     80 (110)
        the mean alone       150 (225)    110 (145)  85 (95)     80 (110)
        gradient, rescaled   130 (175)    115 (125)  50 (70)     60 (105)
        gradient             never        135 (150)  never       70 (85)

    Rescaled means by as much as the layers with factors change the size of theirs. That does as well, but its scale
    comes from the other layers, however sensitive the parameter itself is.

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
        """A diagonal is no larger than the parameter."""
        return {}

    def estimate(self, factors: Mapping[str, Tensor], draws: float) -> Mapping[str, Tensor]:
        """The diagonal, with the tensor's mean as one draw more."""
        diagonal = factors["F"]
        return {"F": (diagonal.mean() + draws * diagonal) / (1 + draws)}

    def inverse_type(self, chosen: type[Inverse]) -> type[Inverse]:
        """A diagonal is inverted in one way."""
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
