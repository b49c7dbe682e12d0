"""The patch second moment without patches equals that of the patches of ``torch.nn.functional.unfold``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_kfc.factors.convolution import shifted_products
from lightning_kfc.factors.convolution.geometry import Geometry
from lightning_kfc.factors.convolution.patches import patch_second_moment

sizes = st.integers(1, 4)
pads = st.tuples(st.integers(0, 4), st.integers(0, 4))


def unfolded_second_moment(images: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[Tensor, int]:
    """The oracle: patches of images that are padded already."""
    columns = F.unfold(images, kernel, dilation=dilation)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return rows.T @ rows, len(rows)


def assert_equal_up_to_rounding(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-300)
    ratio = float((found - expected).abs().max() / scale)
    assert ratio < 1e-12, f"relative difference {ratio:.3g}"


@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(pads, pads),
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    examples=sizes,
    channels=sizes,
    copy_cost=st.sampled_from([0, 8, 10**6]),
    chunk_bytes=st.sampled_from([1, 2000, 2**20]),
)
def test_products_by_lag_give_the_second_moment_of_the_patches(
    kernel, dilation, padding, extra, examples, channels, copy_cost, chunk_bytes
):
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    height, width = (max(1, s - sum(p) + e) for s, p, e in zip(spans, padding, extra, strict=True))
    assume(all(h + sum(p) >= s for h, p, s in zip((height, width), padding, spans, strict=True)))
    images = torch.randn(examples, channels, height, width, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        # Both forms, and chunks of one image as of all, whatever the rule would choose here.
        patch.setattr(shifted_products, "COPY_COST", copy_cost)
        patch.setattr(shifted_products, "CHUNK_BYTES", chunk_bytes)
        total, rows = shifted_products.lagged_second_moment(images, kernel, dilation, padding)
    (top, bottom), (left, right) = padding
    expected, expected_rows = unfolded_second_moment(F.pad(images, (left, right, top, bottom)), kernel, dilation)
    assert rows == expected_rows
    assert_equal_up_to_rounding(total, expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    channels=st.integers(2, 3),
)
def test_the_second_moment_holds_the_ones_of_the_bias_in_every_padding_mode(mode, kernel, padding, size, channels):
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    geometry = Geometry.of(kernel, (1, 1), padding, (1, 1), mode)
    total, rows = patch_second_moment(images, geometry, homogeneous=True)
    amounts = (padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(images, amounts, mode="constant" if mode == "zeros" else mode)
    columns = F.unfold(padded, kernel).transpose(1, 2)
    bordered = torch.cat([columns, torch.ones_like(columns[..., :1])], dim=-1).flatten(0, 1)
    assert rows == len(bordered)
    assert_equal_up_to_rounding(total[0], bordered.T @ bordered)


@given(kernel=st.integers(1, 5), dilation=st.integers(1, 2), padding=st.integers(0, 3), extra=st.integers(0, 5))
def test_one_dimension_is_an_image_of_height_one(kernel, dilation, padding, extra):
    length = max(1, dilation * (kernel - 1) + 1 - 2 * padding + extra)
    signals = torch.randn(3, 2, length, dtype=torch.float64)
    geometry = Geometry.of((kernel,), (1,), (padding,), (dilation,))
    total, rows = patch_second_moment(signals, geometry, homogeneous=False)
    padded = F.pad(signals, (padding, padding)).unsqueeze(2)
    expected, expected_rows = unfolded_second_moment(padded, (1, kernel), (1, dilation))
    assert rows == expected_rows
    assert_equal_up_to_rounding(total[0], expected)


def test_no_chunk_of_images_is_larger_than_stated():
    images = torch.zeros(64, 16, 32, 32)
    chunks = list(shifted_products._chunks(images))
    assert sum(len(chunk) for chunk in chunks) == 64
    assert max(chunk.numel() * chunk.element_size() for chunk in chunks) <= shifted_products.CHUNK_BYTES
