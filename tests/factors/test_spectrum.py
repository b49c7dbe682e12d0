"""Estimates of spectra against decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_kfc import KFC
from lightning_kfc.curvature.spectra import spectra_of
from lightning_kfc.factors.damping import split_damping
from lightning_kfc.factors.spectrum import LANCZOS_STEPS, effective_rank, largest_eigenvalues
from tests.helpers.harness import conv_net


def symmetric(values: Tensor, groups: int = 1) -> Tensor:
    """Matrices with these eigenvalues, in random bases."""
    d = len(values)
    generator = torch.Generator().manual_seed(d)
    bases = torch.linalg.qr(torch.randn(groups, d, d, generator=generator, dtype=values.dtype)).Q
    return bases @ torch.diag(values) @ bases.mT


@pytest.mark.parametrize("d", range(1, LANCZOS_STEPS + 1))
def test_small_matrices_have_their_exact_largest_eigenvalue(d: int) -> None:
    matrix = symmetric(torch.linspace(0.5, 2, d, dtype=torch.float64), groups=3)
    (found,) = largest_eigenvalues([matrix])
    assert found.tolist() == pytest.approx([2.0 if d > 1 else 0.5] * 3, rel=1e-12)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_largest_eigenvalue_of_a_power_law_is_found_from_below(
    decay: float, dtype: torch.dtype, rounding: float
) -> None:
    matrix = symmetric(torch.arange(1, 301, dtype=dtype) ** -decay)
    (found,) = largest_eigenvalues([matrix])
    assert 1 - {0.5: 0.05, 1.0: 1e-3, 2.0: 1e-5}[decay] < float(found) < 1 + rounding


def test_matrices_of_one_shape_in_one_batch_are_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [
        symmetric(torch.rand(d, dtype=torch.float64) + 0.1, groups) for d, groups in ((20, 1), (20, 3), (30, 1))
    ]
    matrices.insert(1, torch.rand(2, 20, dtype=torch.float64))
    together = largest_eigenvalues(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        (alone,) = largest_eigenvalues([matrix])
        assert found.shape == (matrix.shape[0],)
        assert torch.allclose(found, alone, rtol=1e-12)
    assert torch.equal(together[1], matrices[1].amax(-1))


def test_degenerate_matrices_have_an_inverse() -> None:
    cases = [torch.zeros(1, 40, 40), 3 * torch.eye(40)[None], torch.full((1, 40, 40), torch.nan), torch.ones(1, 40, 40)]
    zero, identity, spoilt, ones = (float(value) for value in largest_eigenvalues(cases))
    assert zero == 0
    assert identity == pytest.approx(3, rel=1e-6)
    assert spoilt != spoilt
    assert ones == pytest.approx(40, rel=1e-6)


def test_the_global_random_stream_is_not_touched() -> None:
    before = torch.get_rng_state()
    largest_eigenvalues([symmetric(torch.rand(20, generator=torch.Generator()))])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_effective_rank_counts_equal_eigenvalues() -> None:
    values = torch.tensor([2.0] * 3 + [0.0] * 5, dtype=torch.float64)
    assert float(effective_rank(symmetric(values))) == pytest.approx(3)
    assert float(effective_rank(values[None])) == pytest.approx(3)
    skewed = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    assert effective_rank(symmetric(skewed, groups=2)).tolist() == pytest.approx([49 / 21] * 2)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_what_is_reported_of_a_layer_is_near_what_decompositions_give(inverse: Any, damping: float) -> None:
    torch.manual_seed(0)
    model = conv_net(12).double()
    kfc = KFC(model, inverse=inverse, damping=damping, kl_clip=None)
    x, y = torch.randn(32, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    with kfc.capture():
        loss = torch.nn.functional.cross_entropy(model(x), y)
    kfc.update(loss)
    for name, found in spectra_of(kfc.layers, damping).items():
        factors = kfc.layers[name].factors
        values = {key: torch.linalg.eigvalsh(factor[0]) for key, factor in factors.items()}
        largest = float(values["A"][-1] * values["G"][-1])
        assert 0.98 * largest < found.largest_curvature < largest * (1 + 1e-9)
        for key, damped in zip(("A", "G"), split_damping(factors["A"], factors["G"], damping), strict=True):
            exact = float(torch.linalg.cond(damped[0]))
            assert 0.9 * exact < found.conditions[key] < exact * (1 + 1e-6), f"{name}.{key}"
            rank = float(values[key].sum() ** 2 / values[key].square().sum())
            assert found.effective_ranks[key] == pytest.approx(rank, rel=1e-9)


def test_a_rank_without_a_layer_s_inverse_reports_nothing_of_its_condition() -> None:
    model = conv_net()
    kfc = KFC(model)
    with kfc.capture():
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 1, 6, 6)), torch.zeros(4, dtype=torch.long))
    kfc.update(loss)
    layer = kfc.layers["0"]
    layer.inverse = None
    (found,) = spectra_of({"0": layer}, 0.01).values()
    assert found.conditions == {}
    assert set(found.effective_ranks) == {"A", "G"}
