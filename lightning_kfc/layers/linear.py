"""``torch.nn.Linear`` on inputs with any number of leading dimensions, and its relatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import Forward
from lightning_kfc.layers.registry import register_adapter, register_adapter_by_name

#: Bilinear layers whose A would have more columns than this get a diagonal curvature.
LARGEST_PRODUCT = 4096


def leading_rows(tensor: Tensor, batch_axis: int = 0) -> Tensor:
    """Leading dimensions as canonical (examples, positions), one group; a vector is one row.

    Args:
        tensor: Shape ``(*leading, d)``.
        batch_axis: The axis of the examples, if there are several leading axes.
    """
    if tensor.ndim == 1:
        return tensor.reshape(1, 1, 1, -1)
    if tensor.ndim > 2:
        tensor = tensor.movedim(batch_axis, 0)
    return tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), 1, tensor.shape[-1])


@register_adapter(nn.Linear)
class LinearAdapter(Adapter):
    r"""Rows are the input vectors, one per position; A and G as in K-FAC (E1, E2).

    With ``weight_sharing="reduce"`` an example's positions are one row. The examples lie along the first axis, or
    along the second if the nearest enclosing module with an attribute ``batch_first`` has it False.
    """

    kind = "Linear"
    #: Examples of a batch; sequences have more.
    usual_rows = 128

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """Each input vector is a row."""
        return leading_rows(forward.first(), self.options.batch_axis)

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """Each output vector is a row."""
        return leading_rows(output_gradient, self.options.batch_axis)


@register_adapter_by_name("transformers.pytorch_utils.Conv1D")
class TransposedLinearAdapter(LinearAdapter):
    """The ``Conv1D`` of Hugging Face's GPT-2: a Linear whose weight is stored as ``(d_in, d_out)``."""

    kind = "Conv1D (Linear)"

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The transpose."""
        return weight.T.unsqueeze(0)

    def weight_tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The transpose."""
        return matrix[0].T

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """Each input vector is a row."""
        return leading_rows(forward.first("x"), self.options.batch_axis)


@register_adapter(nn.Bilinear)
class BilinearAdapter(LinearAdapter):
    r"""A Linear on the products :math:`x_1 \otimes x_2` of all pairs of input features."""

    kind = "Bilinear"

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse an A that is too large: it has a row for every pair of features."""
        assert isinstance(module, nn.Bilinear)
        pairs = module.in1_features * module.in2_features
        return f"its A would be {pairs} x {pairs}" if pairs > LARGEST_PRODUCT else None

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """The outer product of each pair of input vectors, flattened."""
        values = dict(zip(("input1", "input2"), forward.args, strict=False)) | dict(forward.kwargs)
        return leading_rows(
            (values["input1"].unsqueeze(-1) * values["input2"].unsqueeze(-2)).flatten(-2), self.options.batch_axis
        )
