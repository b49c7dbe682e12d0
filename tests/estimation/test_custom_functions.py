"""Custom autograd functions whose backward runs once only: statistics are as without them, and so is the gradient."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe


class Square(torch.autograd.Function):
    """The square, in a way that other ones break."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 2 * x
        ctx.save_for_backward(2 * x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.slope


class Deletes(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope = ctx.slope
        del ctx.slope
        return gradient * slope


class Forgets(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope, ctx.slope = ctx.slope, None
        return gradient * slope


class Clears(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        found = gradient * slope
        ctx.maybe_clear_saved_tensors()
        return found


class Overwrites(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return slope.mul_(gradient).clone()


class Frees(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = gradient * ctx.slope
        ctx.slope.untyped_storage().resize_(0)
        return found


class Raises(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("one call too many")


class Net(nn.Module):
    def __init__(self, function: type[torch.autograd.Function] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = double(nn.Linear(4, 5)), double(nn.Linear(5, 3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h.square() if self.function is None else self.function.apply(h))


ONCE = [Deletes, Forgets, Clears, Overwrites, Frees]


@pytest.mark.parametrize("function", [Square, *ONCE])
@pytest.mark.parametrize("mixed", [False, True])
def test_statistics_and_gradients_are_those_of_the_plain_function(
    function: type[torch.autograd.Function], mixed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning_kfc")
    x, y = data(6, 4), classes(6, count=3)

    def loss(net: Net) -> Tensor:
        z = net(x)
        return F.cross_entropy(z, y) + (0.1 * z.cosh().mean() if mixed else 0)

    plain, net = Net(None), Net(function)
    expected = observe(plain, lambda: loss(plain))
    loss(plain).backward()
    kfc = engine(net)
    for _ in range(2):
        net.zero_grad()
        with kfc.capture():
            value = loss(net)
        kfc.update(value)
        value.backward()
        for name, parameter in plain.named_parameters():
            oracles.assert_equal(net.get_parameter(name).grad, parameter.grad, what=f"gradient of {name}")
    for name in ("first.0", "second.0"):
        oracles.assert_equal(kfc.layers[name].G, expected.layers[name].G, what=f"G of {name}")
    lines = [r.getMessage() for r in caplog.records if "custom autograd" in r.getMessage()]
    assert len(lines) == (function is not Square)
    assert all(repr(function.__name__) in line for line in lines)
    assert not any(kfc.events.state_dict().values())


@pytest.mark.parametrize("function", ONCE)
def test_a_loss_of_one_trains(function: type[torch.autograd.Function]) -> None:
    net, x = Net(None), data(6, 4)
    kfc, optimizer = engine(net, kl_clip=0.01), torch.optim.SGD(net.parameters(), lr=0.3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with kfc.capture():
            value = function.apply(net(x) - 1).mean()
        kfc.update(value)
        value.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert kfc.layers["first.0"].inverse is not None


def test_one_that_fails_is_named_and_leaves_the_step_to_the_user() -> None:
    net, x, y = Net(Raises), data(6, 4), classes(6, count=3)
    kfc = engine(net)
    with kfc.capture():
        value = F.cross_entropy(net(x), y)
    with pytest.warns(UserWarning, match="the backward of 'Raises', a custom autograd function, failed"):
        kfc.update(value)
    assert kfc.events.failed_statistics == 1
