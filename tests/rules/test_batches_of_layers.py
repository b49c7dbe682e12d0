"""Layers of equal shapes preconditioned in one batch, against one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.factors.inverses import CholeskyInverse, EighInverse, Inverse
from lightning_kfc.rules import natural
from lightning_kfc.rules.natural import solve_all

Shape = tuple[int, int, int]
SHAPES = [(1, 3, 4), (1, 4, 3), (2, 3, 4), (1, 5, 5)]


def layer(shape: Shape, kind: int, generator: torch.Generator) -> tuple[Inverse, Tensor]:
    groups, d_out, d_in = shape

    def factor(d: int, diagonal: bool) -> Tensor:
        root = torch.randn(groups, d, d + 1, generator=generator, dtype=torch.float64)
        dense = root @ root.mT
        return dense.diagonal(dim1=-2, dim2=-1).clone() if diagonal else dense

    factors = {"A": factor(d_in, kind == 1), "G": factor(d_out, False)}
    inverse = (EighInverse if kind == 2 else CholeskyInverse).factorise(factors, 0.1)
    return inverse, torch.randn(shape, generator=generator, dtype=torch.float64)


@given(
    layers=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from([0, 0, 1, 2])), max_size=8),
    seed=st.integers(0, 99),
)
def test_a_batch_gives_each_layer_its_own_update(layers: list[tuple[Shape, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = [layer(shape, kind, generator) for shape, kind in layers]
    inverses, gradients = [inverse for inverse, _ in made], [gradient for _, gradient in made]
    alone, _ = solve_all(inverses, gradients, batched=False)
    batched, _ = solve_all(inverses, gradients, batched=True)
    assert len(alone) == len(batched) == len(layers)
    for inverse, gradient, one, other in zip(inverses, gradients, alone, batched, strict=True):
        assert torch.equal(one, inverse.solve(gradient))
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_equal_layers_are_solved_at_once_and_wide_ones_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    made = [layer((1, 3, 4), 0, generator) for _ in range(3)]
    solved: list[int] = []
    original = CholeskyInverse.solve

    def noted(self: CholeskyInverse, gradient: Tensor) -> Tensor:
        solved.append(len(gradient))
        return original(self, gradient)

    CholeskyInverse.solve = noted
    try:
        solve_all([inverse for inverse, _ in made], [gradient for _, gradient in made], batched=True)
        assert solved == [3]
        solved.clear()
        natural.LARGEST_BATCHED, before = 3, natural.LARGEST_BATCHED
        try:
            solve_all([inverse for inverse, _ in made], [gradient for _, gradient in made], batched=True)
        finally:
            natural.LARGEST_BATCHED = before
        assert solved == [1, 1, 1]
    finally:
        CholeskyInverse.solve = original
