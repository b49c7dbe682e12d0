"""Seeds: their second moment is the weighted Fisher information, exactly or at the 1/√n rate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc import Bernoulli, Categorical, Gaussian
from lightning_kfc.losses.likelihoods import Likelihood
from tests.helpers import oracles
from tests.helpers.nets import data

LIKELIHOODS: list[Likelihood] = [Categorical(), Bernoulli(), Gaussian()]


def weights_of(likelihood: Likelihood, shape: tuple[int, ...]) -> Tensor:
    """Positive weights c, one a term."""
    return data(*(shape[:-1] if likelihood.vector_valued else shape), seed=3).abs() + 0.1


def information(likelihood: Likelihood, logits: Tensor, weights: Tensor) -> Tensor:
    """c H of one position's logits ``(K,)``; elementwise terms have a weight each."""
    H = oracles.INFORMATION[likelihood.name](logits)
    return weights * H if likelihood.vector_valued else torch.diag(weights * H.diagonal())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: likelihood.name)
@given(
    examples=st.integers(1, 3),
    positions=st.lists(st.integers(1, 3), max_size=2),
    outputs=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1, 4]),
)
def test_exact_seeds_of_each_position_sum_to_its_weighted_fisher_information(
    likelihood: Likelihood, examples: int, positions: list[int], outputs: int, scale: float
) -> None:
    shape = (examples, *positions, outputs)
    logits, weights = scale * data(*shape), weights_of(likelihood, shape)
    seeds = torch.stack(list(likelihood.exact_seeds(logits, weights, generator())))
    assert len(seeds) == logits.shape[1:].numel()
    flat = seeds.reshape(len(seeds), examples, -1)
    found = torch.einsum("kni,knj->nij", flat, flat)
    for n in range(examples):
        rows = logits[n].reshape(-1, outputs)
        own = weights[n].reshape(len(rows), -1)
        blocks = [
            information(likelihood, z, c[0] if likelihood.vector_valued else c) for z, c in zip(rows, own, strict=True)
        ]
        oracles.assert_equal(found[n], torch.block_diag(*blocks), what=f"example {n}")


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: likelihood.name)
def test_second_moment_of_sampled_seeds_converges_to_the_fisher_information_at_the_root_rate(
    likelihood: Likelihood,
) -> None:
    z = data(3)
    c = torch.tensor(0.3).double() if likelihood.vector_valued else torch.tensor([0.3, 1.0, 2.0]).double()
    expected = information(likelihood, z, c)
    counts = [250, 1000, 4000, 16000]
    errors = []
    for n in counts:
        squares = []
        for repeat in range(16):
            v = likelihood.sampled_seed(z.expand(n, 3).clone(), c.expand(n, *c.shape), generator(repeat))
            squares.append(float((v.T @ v / n - expected).square().sum()))
        errors.append(math.sqrt(sum(squares) / len(squares)) / float(expected.norm()))
    slope = oracles.slope([math.log(n) for n in counts], [math.log(e) for e in errors])
    # 16 repeats give a root mean square to about 1 part in 6, and four points a slope to about 0.05.
    assert -0.6 < slope < -0.4, f"slope {slope:.3f}, errors {errors}"
    assert errors[-1] < 0.03, f"errors {errors}"


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: likelihood.name)
def test_sampled_seeds_of_different_terms_are_uncorrelated(likelihood: Likelihood) -> None:
    # What lets all terms of a batch travel together: their products have mean zero.
    n, shape = 20_000, (2, 3)
    z = data(*shape).expand(n, *shape).clone()
    c = weights_of(likelihood, (n, *shape))
    v = likelihood.sampled_seed(z, c, generator())
    cross = torch.einsum("ni,nj->ij", v[:, 0], v[:, 1]) / n
    own = torch.einsum("ni,nj->ij", v[:, 0], v[:, 0]) / n
    assert float(cross.norm() / own.norm()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: likelihood.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_are_finite_and_keep_the_precision_where_outputs_are_saturated(
    likelihood: Likelihood, dtype: torch.dtype
) -> None:
    z = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    c = weights_of(likelihood, (2, 3)).to(dtype)
    seeds = [likelihood.sampled_seed(z, c, generator()), *likelihood.exact_seeds(z, c, generator())]
    assert all(bool(torch.isfinite(seed).all()) and seed.dtype == dtype for seed in seeds)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: likelihood.name)
def test_terms_of_weight_zero_get_no_seed(likelihood: Likelihood) -> None:
    z = data(4, 3)
    c = weights_of(likelihood, (4, 3))
    c[1] = 0
    seeds = [likelihood.sampled_seed(z, c, generator()), *likelihood.exact_seeds(z, c, generator())]
    assert all(not bool(seed[1].any()) and bool(torch.isfinite(seed).all()) for seed in seeds)


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Gaussian])
def test_options_of_a_likelihood_are_checked_when_it_is_made(kind: type[Likelihood]) -> None:
    with pytest.raises(ValueError, match=r"reduction must be one of 'mean', 'sum', got 'average'"):
        kind(output_of="head", reduction="average")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match=r"output_of must be the name of a module, got 3 of type int"):
        kind(output_of=3)  # type: ignore[arg-type]  # wrong on purpose


def test_the_class_axis_is_checked_when_the_likelihood_is_made() -> None:
    with pytest.raises(TypeError, match=r"class_dim must be a whole number, got '1'"):
        Categorical(output_of="head", class_dim="1")  # type: ignore[arg-type]  # wrong on purpose
