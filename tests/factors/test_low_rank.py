"""Gradients of few rows, preconditioned by way of their range, against the whole product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.factors.inverses.cholesky import CholeskyInverse
from lightning_kfc.factors.inverses.low_rank import FewRows, pays
from tests.helpers.nets import classes, data, engine


def inverse_of(d_out: int, d_in: int, generator: torch.Generator) -> CholeskyInverse:
    def factor(d: int) -> Tensor:
        root = torch.randn(1, d, d + 2, generator=generator, dtype=torch.float64)
        return root @ root.mT / d

    return CholeskyInverse.factorise({"A": factor(d_in), "G": factor(d_out)}, 0.01)


def of_rank(rank: int, d_out: int, d_in: int, generator: torch.Generator) -> Tensor:
    left = torch.randn(1, d_out, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(1, rank, d_in, generator=generator, dtype=torch.float64)


def by_range(inverse: CholeskyInverse, rows: int) -> FewRows:
    return FewRows(inverse.A_inverse, inverse.G_inverse, inverse, rows)


@given(d_out=st.integers(1, 40), d_in=st.integers(1, 40), rank=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_gradient_of_few_rows_gets_the_update_of_the_whole_product(
    d_out: int, d_in: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inverse, gradient = inverse_of(d_out, d_in, generator), of_rank(rank, d_out, d_in, generator)
    few = by_range(inverse, rank)
    found, expected = few.solve_by_range(gradient), inverse.solve(gradient)
    assert found is not None
    assert torch.equal(few.solve(gradient), found)
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_what_more_rows_bring_is_noticed_and_nothing_of_it_is_lost(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inverse = inverse_of(60, 50, generator)
    gradient = of_rank(5, 60, 50, generator) + scale * of_rank(50, 60, 50, generator)
    few = by_range(inverse, 5)
    assert torch.equal(few.solve(gradient), inverse.solve(gradient))
    assert few.solve_by_range(gradient) is None


def test_what_is_not_finite_stays_so() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = of_rank(3, 20, 20, generator)
    gradient[0, 2, 3] = torch.nan
    few = by_range(inverse_of(20, 20, generator), 3)
    assert not torch.isfinite(few.solve(gradient)).all()


def test_the_whole_product_is_made_where_it_is_cheaper_or_rows_are_not_known() -> None:
    inverse = inverse_of(20, 30, torch.Generator().manual_seed(0))
    assert inverse.for_low_rank(3) is inverse
    assert inverse.for_low_rank(None) is inverse
    assert pays(128, 1000, 785)
    assert not pays(512, 1000, 785)
    assert not pays(128, 128, 128)


class Loop:
    """A wide network on small batches, whose first layers' gradients are of few rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(150, 160), nn.Tanh(), nn.Linear(160, 3)).double()
        self.kfc = engine(self.model, damping=0.01, kl_clip=0.03, warmup_steps=1, factor_every_n_steps=4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.5)

    def step(self, number: int, examples: int = 6, penalty: float = 0.0) -> None:
        x, y = data(examples, 150, seed=number), classes(examples, count=3)
        self.optimizer.zero_grad()
        with self.kfc.capture():
            loss = F.cross_entropy(self.model(x), y) + penalty * sum(p.square().sum() for p in self.model.parameters())
        self.kfc.update(loss)
        loss.backward()
        self.kfc.precondition(optimizer=self.optimizer)
        self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def test_a_training_with_small_batches_is_the_one_by_whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    few, solved = Loop(), []
    original = FewRows.solve_by_range
    monkeypatch.setattr(
        FewRows, "solve_by_range", lambda self, gradient: (solved.append(self.rows), original(self, gradient))[1]
    )
    for number in range(10):
        few.step(number)
    assert solved == [6] * 10
    monkeypatch.setattr(CholeskyInverse, "for_low_rank", lambda self, rows: self)
    whole = Loop()
    for number in range(10):
        whole.step(number)
    assert float((few.weights() - whole.weights()).norm()) < 1e-9 * float(whole.weights().norm())


@pytest.mark.parametrize("change", [{"examples": 40}, {"penalty": 1e-3}])
def test_a_larger_batch_or_a_penalty_is_noticed(change: dict[str, Any]) -> None:
    loop = Loop()
    loop.step(0)
    first = loop.kfc.layers["0"]
    assert first.rows == 6
    loop.step(1, **change)
    assert first.rows is None
    loop.step(2)
    assert first.rows is None
    for number in range(3, 6):
        loop.step(number)
    assert first.rows == 6, "asked again when statistics were taken again"


def test_the_number_of_rows_is_in_the_state() -> None:
    loop, other = Loop(), Loop()
    loop.step(0)
    assert loop.kfc.state_dict()["layers"]["0"]["rows"] == 6
    assert other.kfc.load_state_dict(loop.kfc.state_dict()) == []
    assert other.kfc.layers["0"].rows == 6
