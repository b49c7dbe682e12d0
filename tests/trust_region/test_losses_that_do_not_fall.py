"""Trainings whose loss is not lowered as reviews expect: reversed gradients, and forwards that cannot be replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.trust_region.outcome import Outcome
from lightning_kfc.trust_region.region import MOST_RAISED, TrustRegion

#: The loss of labels that are told apart by chance.
CHANCE = torch.tensor(5.0).log().item()


def train(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], *, steps: int, noise: float = 0.0
) -> tuple[KFC, list[float]]:
    """Train on batches of five classes, with noise on the scores of the labels; the loss of each step."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 20, generator=generator)
    scores = inputs @ torch.randn(20, 5, generator=generator) / 4
    targets = (scores + noise * torch.randn(1024, 5, generator=generator)).argmax(1)
    kfc = KFC(model, damping="auto", kl_clip="auto")
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5), []
    for _ in range(steps):
        batch = torch.randperm(1024, generator=generator)[:64]
        optimizer.zero_grad()
        with kfc.capture():
            loss = loss_of(inputs[batch], targets[batch])
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.review(optimizer=optimizer)
        losses.append(float(loss.detach()))
    return kfc, losses


class Reversal(torch.autograd.Function):
    """The identity, whose gradient changes its sign (Ganin et al. 2016, arXiv:1505.07818)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def test_a_step_that_lowers_the_loss_begins_the_count_of_raised_losses_anew() -> None:
    region = TrustRegion(adapts_radius=True, radius=1.0, loss=1.0)
    raised = Outcome(1.0, 2.0, slope=-1.0, curvature=0.0, penalty=0.0)
    for _ in range(MOST_RAISED - 1):
        region.judge(raised, size=1.0)
    assert region.raised == MOST_RAISED - 1
    region.judge(Outcome(1.0, 0.5, slope=-0.5, curvature=0.0, penalty=0.0), size=1.0)
    assert region.raised == 0


@pytest.mark.parametrize(("kept", "ends"), [(0.4, False), (0.97, True)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_shortened_steps_that_halve_the_loss_begin_the_count_of_raised_losses_anew(
    kept: float, ends: bool, sign: float
) -> None:
    # As near a kink, where each whole step raises the loss, and its kept share lowers it.
    region, loss = TrustRegion(adapts_radius=True, radius=1.0, loss=1.0), sign
    counts = []
    for _ in range(3 * MOST_RAISED):
        region.judge(Outcome(loss, loss + 1.0, slope=-1.0, curvature=0.0, penalty=0.0), size=1.0)
        counts.append(region.raised)
        loss -= (1 - kept) * abs(loss)
    assert (max(counts) >= MOST_RAISED) == ends


def test_a_gradient_that_leads_uphill_is_named_and_the_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    features, domain = nn.Linear(20, 16), nn.Linear(16, 2)
    model = nn.Sequential(features, domain)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        # The features learn to hide the sign of an input, by the gradient of a head that learns to find it.
        return F.cross_entropy(domain(Reversal.apply(features(x).tanh())), (x[:, 0] > 0).long())

    with pytest.warns(UserWarning, match=r"have raised the loss of their own batch.*gradient reversal.*the next batch"):
        kfc, losses = train(model, loss, steps=60)
    assert not kfc.reviewer.active
    assert kfc.events.undone_steps + kfc.events.shortened_steps < 30
    resumed = KFC(model, damping="auto", kl_clip="auto")
    resumed.load_state_dict(kfc.state_dict())
    assert "had ended before this state was saved" in caplog.text
    assert not resumed.reviewer.active
    assert max(losses) < 10


class HardRouting(nn.Module):
    """Experts that each get the examples which a gate sends there, so that shapes depend on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        chosen, out = shares.argmax(-1), x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * shares[rows, number, None])
        return out


@pytest.mark.filterwarnings("ignore:.*a batch without examples is left out")
def test_experts_behind_a_hard_gate_learn_without_reviews() -> None:
    torch.manual_seed(0)
    model = HardRouting()
    # With a fixed bound the noise of an expert's few examples in a batch is never averaged out: 0.4 to 0.5 of chance.
    with pytest.warns(UserWarning, match="cannot review steps.*could not be run again"):
        kfc, losses = train(model, lambda x, y: F.cross_entropy(model(x), y), steps=200, noise=0.5)
    assert not kfc.reviewer.active
    assert sum(losses[-20:]) / 20 < 0.3 * CHANCE


# Ratios of rare actions grow exponentially, so that reviews may end.
@pytest.mark.filterwarnings("ignore:.*cannot review steps. the last")
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_policy_gradient_whose_loss_is_always_0_is_learnt(scale: float) -> None:
    # GRPO with one update of each batch (Shao et al. 2024, arXiv:2402.03300): the ratio is 1, and advantages sum to 0.
    torch.manual_seed(0)
    model, rewards = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)), []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        policy = Categorical(logits=model(x))
        actions = policy.sample((8,))
        reward = (actions == y).float()
        rewards.append(float(reward.mean()))
        advantage = (reward - reward.mean(0)) / (reward.std(0) + 1e-4)
        chosen = policy.log_prob(actions)
        return -scale * ((chosen - chosen.detach()).exp() * advantage).mean()

    _, losses = train(model, loss, steps=200)
    assert max(map(abs, losses)) < 1e-6
    assert sum(rewards[-10:]) / 10 > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 28])
def test_many_layers_without_normalisation_or_skips_are_trained(depth: int) -> None:
    # The signal of an example nearly vanishes. Each layer changed by a multiple of its weights, and the loss exploded.
    torch.manual_seed(0)
    inner = [part for _ in range(depth) for part in (nn.ReLU(), nn.Linear(96, 96))]
    model = nn.Sequential(nn.Linear(20, 96), *inner, nn.ReLU(), nn.Linear(96, 5))
    kfc, losses = train(model, lambda x, y: F.cross_entropy(model(x), y), steps=80)
    assert kfc.events.undone_steps < 20
    assert sum(losses[-10:]) / 10 < 0.9 * CHANCE
