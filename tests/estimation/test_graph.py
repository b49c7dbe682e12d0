"""Derivatives handed on when they arrive are those of autograd, and none is kept for the others."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.estimation.graph import EdgeGradients
from tests.helpers.nets import data


def chain() -> tuple[list[Tensor], Tensor]:
    """Outputs along a net with a split, a side branch and an end that nothing passes through."""
    torch.manual_seed(0)
    first = nn.Linear(4, 6).double()(data(3, 4))
    left, right = first.relu().split(3, -1)
    second = nn.Linear(3, 3).double()(left) * right
    unused = nn.Linear(3, 2).double()(second.detach())
    side = nn.Linear(4, 3).double()(data(3, 4, seed=5))
    return [first, left, right, second, unused, side], (second.tanh() + side).sum()


def test_every_derivative_that_autograd_finds_arrives_once() -> None:
    outputs, loss = chain()
    edges = [get_gradient_edge(output) for output in outputs]
    seed = torch.ones_like(loss)
    arrived: dict[int, list[Tensor]] = {}
    sender = EdgeGradients([get_gradient_edge(loss)], edges)
    for _ in range(2):
        arrived.clear()
        sender.back_propagate(
            [get_gradient_edge(loss)], [seed], lambda i, g: arrived.setdefault(i, []).append(g.clone())
        )
    expected = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    assert expected[4] is None
    assert set(arrived) == {i for i, gradient in enumerate(expected) if gradient is not None}
    assert all(len(found) == 1 and torch.equal(found[0], expected[i]) for i, found in arrived.items())


def test_other_edges_are_returned_and_nothing_stays_attached() -> None:
    weight = torch.ones(3, requires_grad=True)
    middle = weight * 2
    loss = middle.square().sum()
    calls: list[int] = []
    sender = EdgeGradients([get_gradient_edge(loss)], [get_gradient_edge(middle)])
    start, seed = [get_gradient_edge(loss)], [torch.ones(())]
    (found,) = sender.back_propagate(start, seed, lambda i, g: calls.append(i), [get_gradient_edge(weight)])
    assert found is not None
    assert torch.equal(found, torch.full((3,), 8.0))
    assert calls == [0]
    loss.backward()
    assert calls == [0]


def test_a_derivative_is_let_go_before_the_next_one_arrives() -> None:
    x = torch.randn(5, requires_grad=True)
    outputs = [x * 1.5]
    for _ in range(4):
        outputs.append(outputs[-1].sin() * 2)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def take(position: int, gradient: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradient.untyped_storage()))
        most = max(most, sum(found() is not None for found in alive))

    loss = outputs[-1].sum()
    sender = EdgeGradients([get_gradient_edge(loss)], [get_gradient_edge(output) for output in outputs])
    sender.back_propagate([get_gradient_edge(loss)], [torch.ones(())], take)
    assert len(alive) == 5
    assert most <= 2


def test_what_a_taker_raises_comes_through_and_detaches() -> None:
    outputs, loss = chain()

    def fail(position: int, gradient: Tensor) -> None:
        raise KeyError("on purpose")

    sender = EdgeGradients([get_gradient_edge(loss)], [get_gradient_edge(outputs[0]), get_gradient_edge(outputs[3])])
    with pytest.raises(KeyError, match="on purpose"):
        sender.back_propagate([get_gradient_edge(loss)], [torch.ones_like(loss)], fail)
    loss.backward()
