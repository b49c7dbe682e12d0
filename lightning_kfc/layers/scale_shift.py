"""Layers that scale and shift units one by one: a Fisher block of at most 2 x 2 per unit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_kfc.factors.inverses import BlockInverse, Inverse
from lightning_kfc.factors.statistics import Statistics, factor_dtype, second_moment_total
from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import Forward, Probe
from lightning_kfc.layers.registry import register_adapter
from lightning_kfc.utilities.torch_internals import version_of

#: Most bytes of normalised inputs that are formed at a time.
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class _Recorded:
    """The input of one forward call, kept until the backward; None if only a shift is trainable."""

    input: Tensor | None
    version: int
    context: Any

    def unchanged_input(self) -> Tensor:
        assert self.input is not None
        if version_of(self.input) != self.version:
            raise RuntimeError(
                "the input of a norm layer was changed in place between forward and backward; "
                "its gradient cannot be computed any more."
            )
        return self.input


class ScaleShiftAdapter(Adapter):
    r"""The Fisher of scale and shift in :math:`y = \gamma \hat x + \beta`, without products of different units.

    An example's gradient is :math:`(\sum_t g_t \hat x_t, \sum_t g_t)`, t over its positions. The block of a unit is
    the sum over examples of this vector's outer product: 2 x 2, or 1 x 1 if only scale or shift is trainable. It is
    the diagonal block of the dense Fisher if examples do not interact above the layer. Products between examples, as a
    batch norm above creates, are left out. Examples lie along the first axis, or along the second inside a module whose
    ``batch_first`` is False.

    A subclass defines :meth:`normalised`. Its input is kept by reference from forward to backward, so in a step with
    statistics an activation checkpoint saves no memory on this input.
    """

    treatment: ClassVar[str] = "block"
    #: Whether units lie along the second axis; else along as many last axes as the scale has.
    units_second: ClassVar[bool] = False

    @abstractmethod
    def normalised(self, input: Tensor, context: Any) -> Tensor:
        r"""The input before scale and shift, :math:`\hat x`, in the input's shape.

        Args:
            input: The input of the forward call, in float32 or float64.
            context: The result of :meth:`context` in the forward.
        """

    def context(self, forward: Forward) -> Any:
        """State that :meth:`normalised` needs and that may change after the forward; by default None."""
        return None

    def couples_examples(self, context: Any) -> bool:
        """Whether :meth:`normalised` of one example depends on other examples."""
        return False

    @property
    def groups(self) -> int:
        """The number of units; each is a group."""
        return next(iter(self.parameters().values())).numel()

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The scales, ``(units, 1, 1)``."""
        return weight.reshape(-1, 1, 1)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """One block a unit."""
        units, _, d = self.matrix_shape()
        return {"F": (units, d, d)}

    def diagonal_sides(self) -> dict[str, str]:
        """Empty: blocks are small."""
        return {}

    def inverse_type(self, chosen: type[Inverse]) -> type[Inverse]:
        """The inverse of small blocks."""
        return BlockInverse

    # Rows.

    def _rows(self, tensor: Tensor) -> Tensor:
        """A tensor shaped as the input, as ``(examples, positions, units, 1)``."""
        if self.units_second:
            by_unit = tensor.reshape(len(tensor), self.groups, -1)
            return by_unit.transpose(1, 2).unsqueeze(-1)
        own_axes = next(iter(self.parameters().values())).ndim
        if tensor.ndim == own_axes:
            return tensor.reshape(1, 1, self.groups, 1)
        if tensor.ndim > own_axes + 1:
            tensor = tensor.movedim(self.options.batch_axis, 0)
        return tensor.reshape(len(tensor), -1, self.groups, 1)

    def _scaled_rows(self, input: Tensor, context: Any) -> Tensor:
        return self._rows(self.normalised(input.to(factor_dtype(input.dtype)), context))

    def weight_input_rows(self, forward: Forward) -> Tensor:
        r"""The normalised inputs :math:`\hat x`."""
        return self._scaled_rows(_only(forward), self.context(forward))

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """The derivative at each unit."""
        return self._rows(output_gradient)

    def probe(self, forward: Forward, record: Any, direction: Tensor) -> Probe:
        """See :class:`Adapter`; computed from the kept input, since the products would be as large."""
        own = self.own_parameters()
        if "weight" not in own:
            return super().probe(forward, record, direction)

        def products() -> Tensor:
            kept = record.unchanged_input()
            along = direction.to(kept.device, factor_dtype(kept.dtype))
            shift = along[:, 1] if "bias" in own else along.new_zeros(())
            chunks = self._scaled_chunks(kept, record.context)
            return torch.cat([rows.squeeze(-1) * along[:, 0] + shift for rows in chunks])

        return products

    # Statistics.

    def record(self, forward: Forward) -> _Recorded:
        """Keep the input, from which :meth:`statistics` computes the normalised one."""
        if "weight" not in self.own_parameters():
            return _Recorded(None, 0, None)
        kept = _only(forward)
        return _Recorded(kept, version_of(kept), self.context(forward))

    def statistics(self, record: Any, output_gradient: Tensor) -> Statistics:
        """The sum over examples of the outer products of their gradients, a block a unit."""
        rows = self.output_rows(output_gradient.to(factor_dtype(output_gradient.dtype)))
        own = self.own_parameters()
        gradients = []
        if "weight" in own:
            gradients.append(self._gradients_of_scale(rows, record.unchanged_input(), record.context))
        if "bias" in own:
            gradients.append(rows.sum(1, keepdim=True))
        return Statistics({}, {"F": second_moment_total(torch.cat(gradients, -1))}, len(rows))

    def _gradients_of_scale(self, rows: Tensor, input: Tensor, context: Any) -> Tensor:
        """The sum over positions of derivative times normalised input, ``(examples, 1, units, 1)``."""
        first, products = 0, []
        for scaled in self._scaled_chunks(input, context):
            some = rows[first : first + len(scaled)]
            products.append((some * scaled.to(some.dtype)).sum(1, keepdim=True))
            first += len(scaled)
        return torch.cat(products)

    def _scaled_chunks(self, input: Tensor, context: Any) -> Iterator[Tensor]:
        """The normalised inputs as rows, in chunks of independent examples.

        Small temporary tensors stay in a core's cache, and do not fragment the memory.
        """
        alone = (
            self._rows(input).shape[0] != len(input) or self.options.batch_axis != 0 or self.couples_examples(context)
        )
        size = CHUNK_BYTES * len(input) // max(1, input.nbytes)
        for part in [input] if alone else torch.split(input, max(1, size)):
            yield self._scaled_rows(part, context)


def _only(forward: Forward) -> Tensor:
    """The only input, of any name."""
    return forward.first(next(iter(forward.kwargs), ""))


@register_adapter(nn.PReLU)
class PReLUAdapter(ScaleShiftAdapter):
    """The slope of the negative half, one for all or one a channel: it multiplies the negative part of the input."""

    kind: ClassVar[str] = "PReLU"
    units_second: ClassVar[bool] = True

    def normalised(self, input: Tensor, context: Any) -> Tensor:
        """The negative part of the input."""
        return input.clamp(max=0)
