"""The trace from few products, and the quadratic form that rests on it, against the exact ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.factors.quadratic_form import (
    COLUMNS,
    estimate_pays,
    estimated_quadratic_form,
    estimated_trace,
    quadratic_form,
)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(groups=st.integers(1, 3), dimensions=st.integers(1, 60), rank=st.integers(0, COLUMNS), seed=st.integers(0, 99))
def test_a_trace_of_low_rank_is_exact(groups: int, dimensions: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = normal(generator, groups, dimensions, rank) @ normal(generator, groups, rank, dimensions)
    found = estimated_trace(lambda x: matrix @ x, groups, dimensions, matrix)
    expected = matrix.diagonal(dim1=-2, dim2=-1).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-9, abs=1e-9 * float(matrix.norm()) + 1e-300)


@given(seed=st.integers(0, 99))
def test_the_error_of_a_falling_spectrum_is_that_of_what_falls_outside(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(normal(generator, 200, 200))
    values = torch.arange(1, 201, dtype=torch.float64) ** -1.5
    matrix = ((basis * values) @ basis.T).unsqueeze(0)
    found = float(estimated_trace(lambda x: matrix @ x, 1, 200, matrix))
    # Hutchinson's standard deviation on the part beyond the sketch, six of them; the sketch may lose a few directions.
    deviation = float(values[COLUMNS // 2 :].norm()) * (2 / COLUMNS) ** 0.5
    assert abs(found - float(values.sum())) < 6 * deviation


def large_factors(groups: int, d_out: int, d_in: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(d_out)

    def factor(d: int) -> torch.Tensor:
        root = normal(generator, groups, d, d) * torch.arange(1, d + 1).double() ** -1.0
        return root @ root.mT

    return {"A": factor(d_in), "G": factor(d_out)}, normal(generator, groups, d_out, d_in)


@pytest.mark.parametrize(("groups", "d_out", "d_in"), [(1, 300, 260), (2, 250, 400)])
def test_the_estimated_quadratic_form_is_close_to_the_exact_one(groups: int, d_out: int, d_in: int) -> None:
    factors, delta = large_factors(groups, d_out, d_in)
    assert estimate_pays(factors, delta)
    exact = float(quadratic_form(factors, delta))
    found = float(estimated_quadratic_form(factors, delta))
    assert found != exact
    assert found == pytest.approx(exact, rel=0.05)


def test_small_and_diagonal_factors_and_blocks_are_taken_exactly() -> None:
    factors, delta = large_factors(1, 20, 300)
    assert not estimate_pays(factors, delta)
    assert torch.equal(estimated_quadratic_form(factors, delta), quadratic_form(factors, delta))
    factors, delta = large_factors(1, 300, 300)
    assert not estimate_pays({**factors, "A": factors["A"].diagonal(dim1=-2, dim2=-1)}, delta)
    assert not estimate_pays({"F": torch.eye(3).double().unsqueeze(0)}, delta[:, :1, :3])
