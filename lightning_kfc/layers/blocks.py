"""Wide linear layers whose larger factor is cut into equal diagonal blocks, to bound its cost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.expensive_factors import blocks_by_cost
from lightning_kfc.layers.forward import Forward, ForwardHook
from lightning_kfc.layers.linear import LinearAdapter


class BlocksAdapter(Adapter):
    r"""Cuts the larger side of another adapter into equal blocks, each a group with its own pair of factors.

    With A in blocks :math:`A_j`, the update of a block of columns is :math:`G^{-1} \nabla_j A_j^{-1}`, and likewise
    with G in blocks. Units of different blocks count as uncorrelated. Rows and gradients are padded with zeros to a
    multiple of the number of blocks.

    Args:
        inner: The layer's adapter, with one group.
    """

    def __init__(self, inner: Adapter) -> None:
        super().__init__(inner.module, inner.options)
        self.sharing = inner.sharing
        self._inner = inner
        self.kind = inner.kind  # type: ignore[misc]  # that of the instance
        self.unseen = inner.unseen  # type: ignore[misc]  # likewise
        self.pairs_rows = inner.pairs_rows  # type: ignore[misc]  # likewise

    def attach(self, hook: ForwardHook) -> RemovableHandle:
        """See :class:`Adapter`."""
        return self._inner.attach(hook)

    def parameters(self) -> dict[str, nn.Parameter]:
        """See :class:`Adapter`."""
        return self._inner.parameters()

    def cut_side(self) -> tuple[str, int]:
        """The cut side, A or G, and the number of its blocks; 1 if few parameters are trainable."""
        _, d_out, d_in = self._inner.matrix_shape()
        return "A" if d_in >= d_out else "G", self._blocks_and_cost()[0]

    def _blocks_and_cost(self) -> tuple[int, float]:
        return blocks_by_cost(self._inner.matrix_shape(), self._inner.usual_rows, self.options)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See :class:`Adapter`: shape ``(blocks, d_out, d_in)``, the cut side being that of a block."""
        side, blocks = self.cut_side()
        return self._cut_matrix(self._inner.matrix(tensors), side, blocks)

    def _cut_matrix(self, matrix: Tensor, side: str, blocks: int) -> Tensor:
        if blocks == 1:
            return matrix
        if side == "A":
            return _cut(matrix[0], blocks).transpose(0, 1)
        return _cut(matrix[0].T, blocks).permute(1, 2, 0)

    def write(self, matrix: Tensor, into: Mapping[str, Tensor]) -> None:
        """See :class:`Adapter`."""
        side, blocks = self.cut_side()
        if blocks > 1:
            _, d_out, d_in = self._inner.matrix_shape()
            joined = matrix.transpose(0, 1).flatten(1) if side == "A" else matrix.flatten(0, 1)
            matrix = joined[:d_out, :d_in].unsqueeze(0)
        self._inner.write(matrix, into)

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """See :class:`Adapter`; not cut."""
        return self._inner.weight_input_rows(forward)

    def input_rows(self, forward: Forward) -> Tensor:
        """See :class:`Adapter`."""
        return self._cut_rows(self._inner.input_rows(forward), "A")

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """See :class:`Adapter`."""
        return self._cut_rows(self._inner.output_rows(output_gradient), "G")

    def _cut_rows(self, rows: Tensor, of: str) -> Tensor:
        side, blocks = self.cut_side()
        if blocks == 1:
            return rows
        return _cut(rows[:, :, 0], blocks) if of == side else rows.expand(-1, -1, blocks, -1)

    def second_moment(self, rows: Tensor, side: str) -> Tensor:
        """See :class:`Adapter`; the second moment of the uncut side is formed once for all blocks."""
        cut, blocks = self.cut_side()
        if blocks == 1 or side == cut:
            return super().second_moment(rows, side)
        return super().second_moment(rows[:, :, :1], side).repeat(blocks, 1, 1)

    def diagonal_sides(self) -> dict[str, str]:
        """Empty: no side of a layer in blocks is larger than ``max_factor_dim``."""
        return {}

    def select(self, role: str, tensor: Tensor) -> Tensor:
        """See :class:`Adapter`."""
        return self._inner.select(role, tensor)

    def approximation(self) -> str:
        """See :class:`Adapter`: which factor is cut, and why."""
        side, blocks = self.cut_side()
        if blocks == 1:
            return self.sharing.reason
        cost = f"one would cost {self._blocks_and_cost()[1]:,.0f} x the layer's forward and backward"
        return "; ".join(text for text in (self.sharing.reason, f"{side} in {blocks} blocks: {cost}") if text)


def in_blocks(adapter: Adapter) -> Adapter:
    """The adapter, or a :class:`BlocksAdapter` of it if it is that of a Linear whose larger side costs too much."""
    if not isinstance(adapter, LinearAdapter):
        return adapter
    shape = adapter.matrix_shape_of(adapter.parameters())
    return BlocksAdapter(adapter) if blocks_by_cost(shape, adapter.usual_rows, adapter.options)[0] > 1 else adapter


def _cut(values: Tensor, blocks: int) -> Tensor:
    """The last axis as ``(blocks, size)``, padded with zeros at its end."""
    missing = -values.shape[-1] % blocks
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*values.shape[:-1], blocks, -1)
