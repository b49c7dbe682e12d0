"""Parameters that no layer's rows explain: the diagonal of the Fisher from one sample of all targets a step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.factors.running_average import RunningAverage
from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine


class Gated(nn.Module):
    """A Linear, with raw parameters around it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(data(2, 3))
        self.gate = nn.Parameter(torch.tensor(0.7).double())
        self.head = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * self.head((x + self.position).tanh()).mean(1)


def losses() -> tuple[Gated, KFC]:
    torch.manual_seed(0)
    model = Gated()
    return model, engine(model, fisher="mc")


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(data(6, 2, 3)), classes(6, count=4))


@pytest.mark.slow
def test_the_diagonal_is_that_of_the_dense_fisher_on_average_over_samples() -> None:
    model, rounds = Gated(), 400
    kfc = engine(model, fisher="mc", ema_decay=0.0, inverse_every_n_steps=10**6, warmup_steps=0)
    total = {"position": torch.zeros(6).double(), "gate": torch.zeros(1).double()}
    for _ in range(rounds):  # nothing is learned in between
        with kfc.capture():
            loss = loss_of(model)
        kfc.update(loss)
        kfc.precondition(lr=0.1)
        for name in total:
            total[name] += kfc.layers[name].factors["F"][0] / rounds
    hessian = oracles.logits_hessian(lambda z: F.cross_entropy(z, classes(6, count=4)), model(data(6, 2, 3)))
    for name, found in total.items():

        def logits(value: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(model, {name: value}, (data(6, 2, 3),))

        J = oracles.jacobian(logits, model.get_parameter(name))
        expected = torch.einsum("ai,ab,bi->i", J, hessian, J)
        # Each square has the variance 2 f^2.
        deviation = (found / expected - 1).abs().max() / math.sqrt(2 / rounds)
        assert float(deviation) < 4, oracles.ratio(found, expected)


def test_the_tensor_s_mean_counts_as_one_sample_more() -> None:
    model, kfc = losses()
    for draws in (1, 2, 3):
        with kfc.capture():
            loss = loss_of(model)
        kfc.update(loss)
        loss.backward()
        gradient = model.position.grad.clone()
        kfc.precondition(lr=0.1)
        # Equal shares, were there no decay: here they are decay^0, decay^1, ... over their sum.
        shares = torch.tensor([kfc.settings.ema_decay**age for age in range(draws)]).double()
        n = float(shares.sum() ** 2 / shares.square().sum())
        f = kfc.layers["position"].factors["F"].reshape(2, 3)
        expected = gradient / ((f.mean() + n * f) / (1 + n) + 0.01)
        oracles.assert_equal(model.position.grad, expected, what=f"update after {draws} draws")
        model.zero_grad()
    assert 2.9 < n < 3


@given(decays=st.lists(st.floats(0, 0.99), min_size=1, max_size=8))
def test_draws_are_the_inverse_of_the_sum_of_squared_shares(decays: list[float]) -> None:
    average = RunningAverage.start(torch.zeros(1), decays[0])
    shares = [1 - decays[0]]
    for decay in decays[1:]:
        average = average.updated(torch.zeros(1), decay)
        shares = [decay * share for share in shares] + [1 - decay]
    expected = sum(shares) ** 2 / sum(share**2 for share in shares)
    assert average.draws == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= average.draws <= len(decays) + 1e-9


def test_a_resumed_run_remembers_how_many_draws_there_were() -> None:
    model, kfc = losses()
    other = engine(model, fisher="mc")
    for _ in range(3):
        with kfc.capture():
            loss = loss_of(model)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)
    other.load_state_dict(kfc.state_dict())
    for each in (kfc, other):
        with each.capture():
            loss = loss_of(model)
        each.update(loss)
    first, second = (each.layers["position"].inverse.F_inverse for each in (kfc, other))
    assert torch.equal(first, second)


def test_a_coordinate_whose_only_draw_is_zero_does_not_take_the_step_of_a_flat_one() -> None:
    model, kfc = losses()
    with kfc.capture():
        loss = loss_of(model)
    kfc.update(loss)
    layer = kfc.layers["position"]
    diagonal = layer.factors["F"]
    diagonal[0, 0] = 0
    layer.take(layer.refreshed(type(layer.inverse), 1e-12, 0.0), step=0)
    expected = 2 / float(diagonal.mean())
    found = float(layer.inverse.F_inverse[0, 0])
    assert found == pytest.approx(expected, rel=1e-5), f"found / expected = {found / expected:g}"
