"""The gradient that SGD makes a wanted step of: with momentum it moves as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

from lightning_kfc.rules.momentum import is_sgd, lengthening, limit_momentum, momenta, take_momentum_out
from tests.helpers import oracles
from tests.helpers.nets import data


@given(
    momentum=st.sampled_from([0.3, 0.5, 0.9, 0.99]),
    decay=st.sampled_from([0.0, 0.1]),
    dampening=st.sampled_from([0.0, 0.4]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    foreach=st.booleans(),
    scale=st.sampled_from([1.0, 1024.0]),
    rates=st.lists(st.sampled_from([0.01, 0.5]), min_size=1, max_size=5),
)
def test_steps_are_those_of_sgd_without_momentum_and_with_the_same_decay(
    momentum: float,
    decay: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    foreach: bool,
    scale: float,
    rates: list[float],
) -> None:
    dampening = 0.0 if nesterov else dampening
    options: dict[str, Any] = {"maximize": maximize, "foreach": foreach}
    parameter, plain = nn.Parameter(data(3, 2)), nn.Parameter(data(3, 2))
    optimizer = SGD(
        [parameter], lr=1.0, momentum=momentum, weight_decay=decay, dampening=dampening, nesterov=nesterov, **options
    )
    # Momentum makes a constant decay act 1 / (1 - momentum) times as strongly.
    other = SGD([plain], lr=1.0, weight_decay=decay / (1 - momentum), **options)
    for number, rate in enumerate(rates):
        update = data(3, 2, seed=10 + number)
        for each, value in ((optimizer, parameter), (other, plain)):
            each.param_groups[0]["lr"] = rate
            value.grad = update.clone() if each is other else update * scale
        take_momentum_out(optimizer, [parameter], scale)
        assert parameter.grad is not None
        parameter.grad /= scale
        optimizer.step()
        other.step()
        oracles.assert_equal(parameter.detach(), plain.detach(), what=f"weights after step {number}")


@given(
    momentum=st.sampled_from([0.3, 0.5, 0.9, 0.99]),
    decay=st.sampled_from([0.0, 0.1]),
    dampening=st.sampled_from([0.0, 0.4]),
    maximize=st.booleans(),
    scale=st.sampled_from([1.0, 1024.0]),
    rates=st.lists(st.sampled_from([0.01, 0.5]), min_size=1, max_size=5),
)
def test_steps_above_a_limit_are_those_of_sgd_with_the_limit_and_a_longer_rate(
    momentum: float, decay: float, dampening: float, maximize: bool, scale: float, rates: list[float]
) -> None:
    options: dict[str, Any] = {"maximize": maximize, "dampening": dampening, "weight_decay": decay}
    parameter, other = nn.Parameter(data(3, 2)), nn.Parameter(data(3, 2))
    limited = SGD([parameter], lr=1.0, momentum=momentum, **options)
    reference = SGD([other], lr=1.0, momentum=min(momentum, 0.5), **options)
    for number, rate in enumerate(rates):
        update = data(3, 2, seed=10 + number)
        limited.param_groups[0]["lr"] = rate
        reference.param_groups[0]["lr"] = rate * lengthening(momentum, 0.5)
        parameter.grad, other.grad = update * scale, update.clone()
        limit_momentum(limited, [parameter], 0.5, scale)
        parameter.grad /= scale
        limited.step()
        reference.step()
        oracles.assert_equal(parameter.detach(), other.detach(), what=f"weights after step {number}")


@pytest.mark.parametrize("momentum", [0.6, 0.9, 0.99])
def test_with_nesterov_s_momentum_steps_that_keep_their_direction_become_as_long(momentum: float) -> None:
    parameter, update = nn.Parameter(data(3, 2)), data(3, 2, seed=5)
    optimizer = SGD([parameter], lr=0.1, momentum=momentum, nesterov=True)
    for _ in range(60):
        before = parameter.detach().clone()
        parameter.grad = update.clone()
        limit_momentum(optimizer, [parameter], 0.5, 1.0)
        optimizer.step()
    oracles.assert_equal(before - parameter.detach(), 0.1 * update / (1 - momentum), what="the step")


def test_a_buffer_that_sparse_gradients_have_left_becomes_dense() -> None:
    parameter, plain = nn.Parameter(data(5, 2)), nn.Parameter(data(5, 2))
    optimizer, other = SGD([parameter], lr=0.1, momentum=0.5), SGD([plain], lr=0.1)
    for value in (parameter, plain):
        value.grad = data(5, 2, seed=3).to_sparse()
    for each in (optimizer, other):
        each.step()
    for number in range(3):
        update = data(5, 2, seed=4 + number)
        parameter.grad, plain.grad = update.to_sparse(), update
        take_momentum_out(optimizer, [parameter], 1.0)
        optimizer.step()
        other.step()
        oracles.assert_equal(parameter.detach(), plain.detach(), what="weights")


def test_a_parameter_without_gradient_and_those_of_others_are_left_alone() -> None:
    mine, foreign, idle = (nn.Parameter(data(2, 2)) for _ in range(3))
    optimizer = SGD([mine, idle], lr=0.1, momentum=0.5)
    foreign.grad = data(2, 2)
    take_momentum_out(optimizer, [foreign, idle], 1.0)
    assert torch.equal(foreign.grad, data(2, 2))
    assert idle.grad is None


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "dampening": 1.0}])
def test_where_there_is_no_momentum_that_can_be_taken_out_none_is_named(options: dict[str, float]) -> None:
    parameter = nn.Parameter(data(2))
    assert momenta(SGD([parameter], lr=0.1, **options)) == {}


def test_momenta_are_those_of_each_group_of_an_sgd() -> None:
    first, second = nn.Parameter(data(2)), nn.Parameter(data(2))
    optimizer = SGD([{"params": [first]}, {"params": [second], "momentum": 0.9}], lr=0.1, momentum=0.5)
    assert momenta(optimizer) == {id(first): 0.5, id(second): 0.9}
    assert is_sgd(optimizer)
    assert momenta(AdamW([first])) == momenta(None) == {}
