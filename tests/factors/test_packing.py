"""A symmetric matrix comes out of a buffer as it went in, and takes about half of its elements there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.factors.packing import pack, packed_numel, unpack
from tests.helpers.nets import data


@given(st.integers(1, 3), st.one_of(st.integers(1, 40), st.integers(120, 330)), st.integers(0, 3))
def test_a_symmetric_matrix_comes_out_as_it_went_in(groups: int, d: int, before: int) -> None:
    matrix = data(groups, d, d)
    matrix = matrix + matrix.mT
    buffer = torch.full((before + packed_numel((groups, d, d)) + 2,), torch.nan, dtype=torch.float64)
    pack(matrix, buffer[before:-2])
    assert torch.equal(unpack(buffer[before:-2], (groups, d, d)), matrix)
    assert not buffer[before:-2].isnan().any()
    assert buffer[:before].isnan().all()
    assert buffer[-2:].isnan().all()


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
def test_diagonals_and_matrices_that_are_not_symmetric_are_taken_as_they_are(groups: int, rows: int, d: int) -> None:
    for tensor, symmetric in ((data(groups, d), True), (data(groups, rows, d), False)):
        shape = tuple(tensor.shape)
        buffer = tensor.new_empty(packed_numel(shape, symmetric=symmetric))
        assert buffer.numel() == tensor.numel()
        pack(tensor, buffer, symmetric=symmetric)
        assert torch.equal(unpack(buffer, shape, symmetric=symmetric), tensor)


@pytest.mark.parametrize(("d", "share"), [(256, 0.63), (1024, 0.54), (4609, 0.54)])
def test_a_large_matrix_takes_little_more_than_half_of_its_elements(d: int, share: float) -> None:
    assert 0.5 < packed_numel((1, d, d)) / d**2 < share
