"""``torch.nn.Linear`` on inputs with any number of leading dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_kfc.layers.adapter import Adapter, Forward
from lightning_kfc.layers.registry import register_adapter


def _rows(tensor: Tensor) -> Tensor:
    """Leading dimensions as (examples, positions): the first one is the batch; a vector is one row."""
    if tensor.ndim == 1:
        return tensor.reshape(1, 1, 1, -1)
    return tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), 1, tensor.shape[-1])


@register_adapter(nn.Linear)
class LinearAdapter(Adapter):
    r"""Rows are the input vectors; A and G as in K-FAC (E1, E2), each position a row of its own."""

    kind = "Linear"

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """Each input vector is a row."""
        return _rows(forward.first())

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """Each output vector is a row."""
        return _rows(output_gradient)
