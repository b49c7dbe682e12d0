"""``torch.nn.Embedding`` and ``EmbeddingBag``: Linears on one-hot rows, whose A is diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_kfc.factors.sparse import dense, overwrite
from lightning_kfc.factors.statistics import InputStatistic, Statistics, factor_dtype
from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import Forward
from lightning_kfc.layers.registry import register_adapter


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one call.

    Attributes:
        A: The diagonal's total.
        kept: Whether the weight contributes to an output row; False for padding. Shape ``(examples, positions)``.
    """

    A: InputStatistic
    kept: Tensor


class _TableAdapter(Adapter):
    """A weight ``(tokens, d_out)``; each column of the gradient matrix belongs to one token."""

    #: One example's rows would be as large as the table. With "ekfac", the eigenvalues are those of the factors.
    pairs_rows: ClassVar[bool] = False
    module: nn.Embedding | nn.EmbeddingBag

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse gradients that torch rescales by token."""
        return "scale_grad_by_freq changes its gradient" if getattr(module, "scale_grad_by_freq", False) else None

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The transpose."""
        return dense(weight).T.unsqueeze(0)

    def write(self, matrix: Tensor, into: Mapping[str, Tensor]) -> None:
        """See :class:`Adapter`; a sparse gradient stays sparse.

        Tokens without a gradient get no update, since A is diagonal.
        """
        overwrite(into["weight"], matrix[0].T)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """A is a diagonal for any number of tokens."""
        return {**super().factor_shapes(), "A": (1, self.matrix_shape()[2])}

    def diagonal_sides(self) -> dict[str, str]:
        """See :class:`Adapter`; A is not listed, since it is diagonal exactly."""
        return {name: reason for name, reason in super().diagonal_sides().items() if name != "A"}

    def _kept(self, tokens: Tensor) -> Tensor:
        padding = self.module.padding_idx
        return torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding

    def statistics(self, record: Any, output_gradient: Tensor) -> Statistics:
        """A from the tokens, G from the rows to which the weight contributes."""
        assert isinstance(record, _Tokens)
        rows = self.output_rows(output_gradient.to(factor_dtype(output_gradient.dtype)))
        total = self.second_moment(rows * record.kept[..., None, None], "G")
        return Statistics({"A": record.A.total}, {"G": total}, record.A.rows)


@register_adapter(nn.Embedding)
class EmbeddingAdapter(_TableAdapter):
    r"""Rows are one-hot: A is the diagonal of the tokens' frequencies, exactly; padding has no rows.

    Each position is a row for any ``weight_sharing``: a mean of one-hot rows would have a dense A.
    """

    kind = "Embedding"
    module: nn.Embedding

    def _tokens(self, forward: Forward) -> Tensor:
        tokens = forward.first()
        return tokens.reshape(1, 1) if tokens.ndim == 0 else tokens.reshape(tokens.shape[0], -1)

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """The one-hot rows, for checks only; zero where the token is padding."""
        tokens = self._tokens(forward)
        one_hot = nn.functional.one_hot(tokens, self.module.num_embeddings)
        return (one_hot * self._kept(tokens)[..., None]).unsqueeze(2).to(self.module.weight.dtype)

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """Each looked-up vector is a row."""
        examples = output_gradient.shape[0] if output_gradient.ndim > 1 else 1
        return output_gradient.reshape(examples, -1, 1, self.module.embedding_dim)

    def project(self, forward: Forward, direction: Tensor) -> Tensor:
        """The direction's entries of the tokens."""
        tokens = self._tokens(forward)
        return (direction.to(tokens.device)[0, tokens] * self._kept(tokens)).unsqueeze(-1)

    def record(self, forward: Forward) -> Any:
        """The tokens' frequencies, and the positions without padding."""
        tokens = self._tokens(forward)
        kept = self._kept(tokens)
        seen = tokens[kept]
        # bincount has no deterministic form on a GPU; sums of ones are the same in any order.
        counts = torch.zeros(
            self.module.num_embeddings, dtype=factor_dtype(self.module.weight.dtype), device=seen.device
        )
        counts.index_add_(0, seen, counts.new_ones(seen.numel()))
        return _Tokens(InputStatistic(counts.unsqueeze(0), seen.numel()), kept)


@register_adapter(nn.EmbeddingBag)
class EmbeddingBagAdapter(_TableAdapter):
    r"""Rows are the bags, :math:`a = \sum_i w_i e_{t_i}` (w = 1 over the bag's size for means).

    A is approximated by its diagonal, without products of tokens in one bag. It is exact for bags of one token.
    """

    kind = "EmbeddingBag"
    module: nn.EmbeddingBag

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse maxima, whose features come from different tokens."""
        assert isinstance(module, nn.EmbeddingBag)
        return 'mode="max" takes each feature from another token' if module.mode == "max" else super().refusal(module)

    def _bags(self, forward: Forward) -> Tensor:
        """All rows a, a sparse matrix (bags, tokens)."""
        values = dict(zip(("input", "offsets", "per_sample_weights"), forward.args, strict=False)) | dict(
            forward.kwargs
        )
        tokens, offsets, weights = (values.get(name) for name in ("input", "offsets", "per_sample_weights"))
        assert tokens is not None
        if tokens.ndim == 2:
            bags = tokens.shape[0]
            bag = torch.arange(bags, device=tokens.device).repeat_interleave(tokens.shape[1])
        else:
            assert offsets is not None
            starts = offsets[:-1] if self.module.include_last_offset else offsets
            bags = starts.numel()
            position = torch.arange(tokens.numel(), device=tokens.device)
            bag = torch.searchsorted(starts.contiguous(), position.to(starts.dtype), right=True) - 1
        flat = tokens.reshape(-1)
        dtype = factor_dtype(self.module.weight.dtype)
        share = torch.ones(flat.shape, dtype=dtype, device=flat.device)
        kept = self._kept(flat) & (bag >= 0)
        if weights is not None:
            share = weights.detach().reshape(-1).to(dtype)
        if self.module.mode == "mean":
            sizes = torch.zeros(bags, dtype=dtype, device=flat.device).index_add_(0, bag[kept], share[kept])
            share = share / sizes.clamp(min=1)[bag]
        entries = torch.stack([bag[kept], flat[kept]])
        shape = (bags, self.module.num_embeddings)
        return torch.sparse_coo_tensor(entries, share[kept], shape, check_invariants=False).coalesce()

    def weight_input_rows(self, forward: Forward) -> Tensor:
        """The rows as a dense matrix, for checks only."""
        return self._bags(forward).to_dense()[:, None, None, :]

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        """Each bag's vector is a row."""
        return output_gradient[:, None, None, :]

    def project(self, forward: Forward, direction: Tensor) -> Tensor:
        """Sums over the bags."""
        bags = self._bags(forward)
        return (bags @ direction.to(bags).T).unsqueeze(-1)

    def record(self, forward: Forward) -> Any:
        """The mean squares of the rows' entries."""
        bags = self._bags(forward)
        squares = torch.zeros(self.module.num_embeddings, dtype=bags.dtype, device=bags.device)
        squares.index_add_(0, bags.indices()[1], bags.values().square())
        kept = torch.ones((bags.shape[0], 1), dtype=torch.bool, device=bags.device)
        return _Tokens(InputStatistic(squares.unsqueeze(0), bags.shape[0]), kept)
