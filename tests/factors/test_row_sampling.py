"""A part of the rows, half of a symmetric product, and rows in the layout of a product: the same numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.factors.convolution.geometry import Geometry
from lightning_kfc.factors.convolution.patches import part_of_patch_second_moment, patch_rows, patch_second_moment
from lightning_kfc.factors.inverses import CholeskyInverse, EighInverse
from lightning_kfc.factors.row_sampling import number_of_parts, offsets, one_part, steps_along_axes
from lightning_kfc.factors.statistics import BLOCK, all_finite, gram, second_moment_total
from tests.helpers import oracles
from tests.helpers.nets import data


@given(parts=st.integers(1, 16), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_steps_make_at_most_so_many_parts_and_miss_few(parts: int, sizes: list[int]) -> None:
    steps = steps_along_axes(parts, sizes)
    product = math.prod(steps)
    assert len(steps) == len(sizes)
    assert all(step <= size for step, size in zip(steps, sizes, strict=True))
    assert min(parts, sizes[0]) <= product <= parts
    assert len(set(offsets(steps))) == product


@pytest.mark.parametrize(
    ("examples", "positions", "dimensions", "rows_per_dim", "expected"),
    [
        (128, 1024, 144, None, 1),
        (128, 1024, 144, 16, 16),
        (128, 256, 288, 16, 7),
        (128, 64, 576, 16, 1),
        (4, 9, 1, 1, 4),
    ],
)
def test_a_part_keeps_enough_rows_for_the_dimension(
    examples: int, positions: int, dimensions: int, rows_per_dim: int | None, expected: int
) -> None:
    assert number_of_parts(examples, positions, dimensions, rows_per_dim) == expected


def test_the_parts_of_interleaved_examples_make_up_all_rows() -> None:
    rows = data(8, 12, 1, 3)
    shifted = [torch.roll(rows, shift, dims=0) for shift in range(4)]
    whole = sum(second_moment_total(one_part(moved, 4)) for moved in shifted)
    oracles.assert_equal(whole, second_moment_total(rows), what="second moment")


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    mode=st.sampled_from(["zeros", "circular"]),
    groups=st.sampled_from([1, 2]),
    parts=st.integers(2, 16),
)
def test_a_part_of_the_patches_is_that_of_the_unfolded_ones(
    kernel: tuple[int, int], stride: Any, padding: Any, mode: str, groups: int, parts: int
) -> None:
    images = data(16, 4, 9, 7)
    geometry = Geometry.of(kernel, stride, padding, (1, 1), mode, groups)
    total, number = part_of_patch_second_moment(images, geometry, parts, homogeneous=True)
    space = [geometry.outputs(axis, size) for axis, size in enumerate((9, 7))]
    steps = steps_along_axes(parts, space)
    rows = patch_rows(images, geometry).unflatten(1, space)
    taken = [
        rows[j :: math.prod(steps), y :: steps[0], x :: steps[1]].flatten(0, 2)
        for j, (y, x) in enumerate(offsets(steps))
    ]
    flat = torch.cat(taken)
    flat = torch.cat([flat, torch.ones_like(flat[..., :1])], -1)
    expected = torch.einsum("rgi,rgj->gij", flat, flat) * (number / len(flat))
    assert number == 16 * math.prod(space)
    oracles.assert_equal(total, expected, what="total")


@pytest.mark.parametrize("d", [3, 2 * BLOCK, 2 * BLOCK + 7, 3 * BLOCK])
def test_half_of_a_symmetric_product_is_enough(d: int) -> None:
    columns = data(1, d, 5)
    oracles.assert_equal(gram(columns), columns @ columns.mT, what="gram")


@pytest.mark.parametrize("positions", [5, 40])
def test_rows_whose_positions_lie_side_by_side_have_the_same_second_moment(positions: int) -> None:
    channels_first = data(3, 2, 4, positions)
    rows = channels_first.permute(0, 3, 1, 2)
    oracles.assert_equal(second_moment_total(rows), second_moment_total(rows.contiguous()), what="second moment")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_lies_between_the_rows_of_a_checkpoint_enters_no_product(dtype: torch.dtype) -> None:
    def padded(matrix: torch.Tensor) -> torch.Tensor:
        columns = matrix.shape[-1]
        return matrix.new_full((*matrix.shape[:-1], columns + 3), math.nan)[..., :columns].copy_(matrix)

    left, middle, right = (data(1, *shape).to(dtype) for shape in ((20, 20), (20, 31), (31, 31)))
    # As a checkpoint of an earlier version has them.
    inverse = CholeskyInverse(padded(right), padded(left))
    assert inverse.A_inverse.is_contiguous()
    assert EighInverse(right.mT, left.mT, middle, 1.0).A_vectors.is_contiguous()
    expected = left.double() @ middle.double() @ right.double()
    oracles.assert_equal(inverse.solve(middle).double(), expected, rtol=1e-9 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize(("values", "expected"), [([1.0, 2.0], True), ([3e38, 3e38], True), ([1.0, math.nan], False)])
def test_a_sum_that_overflows_is_looked_at_again(values: list[float], expected: bool) -> None:
    assert all_finite(torch.tensor(values)) is expected
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


# So that each phase has as many outputs as the input has pixels, which two steps along each axis divide.
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "added"), [(2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (2, 3, 0, 1), (3, 3, 0, 0)]
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("parts", [4, 9, 16])
def test_the_parts_of_a_transposed_convolution_make_up_all_its_patches(
    kernel: int, stride: int, padding: int, added: int, groups: int, parts: int
) -> None:
    images = data(8, 4, 4, 6)
    geometry = Geometry.transposed((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), (added,) * 2, groups)
    whole, rows = patch_second_moment(images, geometry, homogeneous=True)
    assert rows == 8 * stride**2 * 24
    found = [
        part_of_patch_second_moment(torch.roll(images, shift, dims=0), geometry, parts, homogeneous=True)
        for shift in range(4)
    ]
    assert all(number == rows for _, number in found)
    totals = [total for total, _ in found]
    assert not torch.allclose(totals[0], whole)
    oracles.assert_equal(sum(totals) / 4, whole, what="mean of the parts' totals")
