"""Patches in the order of unfold, for the tensors that no module test reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_kfc.factors.convolution import patches
from lightning_kfc.factors.convolution.geometry import Geometry
from lightning_kfc.factors.convolution.patches import patch_rows, patch_second_moment, project_patches
from tests.helpers import oracles
from tests.helpers.nets import data


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_patch_rows_are_the_columns_of_unfold_in_its_order(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    images = data(2, 3, 5, 6)
    geometry = Geometry.of(kernel, stride, padding, dilation)
    expected = F.unfold(images, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
    assert torch.equal(patch_rows(images, geometry).squeeze(2), expected)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("at_once", [1, 500, 10**9])
def test_second_moment_does_not_depend_on_how_many_patches_are_formed_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int, homogeneous: bool
) -> None:
    images = data(5, 2, 4, 4)
    monkeypatch.setattr(patches, "PATCH_BYTES", at_once)
    total, count = patch_second_moment(images, Geometry.of((2, 2), (1, 1), (1, 1), (1, 1)), homogeneous=homogeneous)
    rows = F.unfold(images, (2, 2), padding=(1, 1)).transpose(1, 2).reshape(-1, 8)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if homogeneous else rows
    assert count == len(rows) == 5 * 25
    oracles.assert_equal(total[0], rows.T @ rows, what="total")


def test_second_moment_of_an_empty_batch_is_zero() -> None:
    total, count = patch_second_moment(data(0, 2, 4, 4), Geometry.of((2, 2), (1, 1), (0, 0), (1, 1)), homogeneous=True)
    assert count == 0
    assert torch.equal(total, torch.zeros(1, 9, 9).double())


@given(
    space=st.integers(1, 3),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    upsampling=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
)
def test_projected_patches_are_the_patches_times_the_direction(
    space: int, groups: int, kernel: int, stride: int, padding: int, dilation: int, upsampling: int, mode: str
) -> None:
    def every(n: int) -> tuple[int, ...]:
        return (n,) * space

    geometry = Geometry.of(every(kernel), every(stride), every(padding), every(dilation), mode, groups)
    if upsampling > 1:
        geometry = replace(geometry, padding_mode="zeros", stride=every(1), upsampling=every(upsampling))
    images = data(2, 2 * groups, *(5, 6, 5)[:space])
    direction = data(groups, 2 * kernel**space)
    expected = torch.einsum("ntgi,gi->ntg", patch_rows(images, geometry), direction)
    oracles.assert_equal(project_patches(images, geometry, direction), expected, what="projection")
