"""Momentum that was bounded at a low learning rate does not grow with the rate."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_kfc import KFC
from tests.helpers import oracles

STEPS = {"rising": (0.1, 0.4, 0.4, 0.1, 0.2), "from 0": (0.4, 0.0, 0.0, 0.4, 0.4), "falling": (0.4, 0.2, 0.1, 0.1)}


def engine(kl_clip: float | Literal["auto"] | None, momentum: float) -> tuple[KFC, nn.Module, SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    options = {"fisher": "empirical", "damping": 0.01, "rule": "natural", "kl_clip": kl_clip}
    return KFC(model, **options), model, SGD(model.parameters(), lr=0.1, momentum=momentum)  # type: ignore[arg-type]  # a mixture of types


def step(kfc: KFC, model: nn.Module, optimizer: SGD, number: int) -> list[torch.Tensor]:
    """One step; the gradients by which the optimizer steps."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    optimizer.zero_grad()
    with kfc.capture():
        loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
    kfc.update(loss)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    kfc.precondition(optimizer=optimizer)
    updates = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    kfc.review(optimizer=optimizer)
    return updates


@pytest.mark.parametrize("rates", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kl_clip", [1e-3, None])
def test_momentum_moves_the_weights_no_further_than_at_the_rate_of_its_own_steps(
    rates: tuple[float, ...], kl_clip: float | None
) -> None:
    kfc, model, optimizer = engine(kl_clip, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    carried = [torch.zeros_like(p) for p in before]
    for number, (last, rate) in enumerate(itertools.pairwise((rates[0], *rates))):
        optimizer.param_groups[0]["lr"] = rate
        updates = step(kfc, model, optimizer, number)
        # Without a bound, momentum is SGD's own.
        share = last / rate if kl_clip is not None and rate > last else 1.0
        carried = [0.5 * share * b + u for b, u in zip(carried, updates, strict=True)]
        after = [p.detach().clone() for p in model.parameters()]
        for p, old, b in zip(after, before, carried, strict=True):
            oracles.assert_equal(p, old - rate * b, what=f"weights after step {number}")
        before = after


def test_a_spell_without_a_rate_leaves_no_momentum_and_a_resumed_run_knows_the_last_rate() -> None:
    for kl_clip in (1e-3, "auto"):
        kfc, model, optimizer = engine(kl_clip, 0.9)
        for number, rate in enumerate((0.1, 0.0, 0.0)):
            optimizer.param_groups[0]["lr"] = rate
            step(kfc, model, optimizer, number)
        again, other, its_own = engine(kl_clip, 0.9)
        other.load_state_dict(model.state_dict())
        its_own.load_state_dict(optimizer.state_dict())
        again.load_state_dict(kfc.state_dict())
        for engine_, net, own in ((kfc, model, optimizer), (again, other, its_own)):
            own.param_groups[0]["lr"] = 0.1
            updates = step(engine_, net, own, 3)
            for parameter, update in zip(net.parameters(), updates, strict=True):
                oracles.assert_equal(own.state[parameter]["momentum_buffer"], update, what="the momentum")
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            oracles.assert_equal(p.detach(), q.detach(), what="the weights of the resumed run")
