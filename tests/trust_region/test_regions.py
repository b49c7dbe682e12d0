"""A trust region for each optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_kfc import KFC
from lightning_kfc.monitoring.events import Events
from lightning_kfc.settings import Settings
from lightning_kfc.trust_region.losses_seen import LossesSeen
from lightning_kfc.trust_region.outcome import Outcome
from lightning_kfc.trust_region.region import START_RADIUS, UNREVIEWED_RADIUS
from lightning_kfc.trust_region.regions import TrustRegions


def actor_and_critic(units: float, steps: int = 25) -> tuple[list[Tensor], list[float], KFC]:
    """Two networks with an optimizer each; the critic's loss is in other units.

    Returns:
        The actor's weights, the critic's losses in its units, and the engine.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({
        name: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
        for name, outputs in (("actor", 3), ("critic", 1))
    })  # fmt: skip
    x = torch.randn(64, 6, dtype=torch.float64)
    y, value = x[:, :3].argmax(1), units * x.sin().sum(1, keepdim=True)
    kfc = KFC(model, kl_clip="auto", damping="auto")
    optimizers = {name: SGD(model[name].parameters(), lr=0.5, momentum=0.5) for name in model}
    losses = []
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            model.zero_grad()
            with kfc.capture():
                out = model[name](x)
                loss = F.cross_entropy(out, y) if name == "actor" else F.mse_loss(units * out, value)
            # The step refreshes the layers of its optimizer alone.
            kfc.update(loss, accumulate=True)
            loss.backward()
            kfc.precondition(optimizer=optimizer)
            optimizer.step()
            kfc.review(optimizer=optimizer)
        losses.append(float(loss.detach()) / units**2)
    return [p.detach() for p in model["actor"].parameters()], losses, kfc


def test_the_units_of_one_optimizers_loss_do_not_touch_the_steps_of_another() -> None:
    plain, critic, _ = actor_and_critic(1.0)
    for units in (1e-3, 1e3):
        other, own, kfc = actor_and_critic(units)
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-9)
        # Nor its own.
        assert own == pytest.approx(critic, rel=1e-6)
        radii = [region.radius / region.loss for region in kfc.reviewer.regions]
        assert len(radii) == 2
        assert all(math.isfinite(radius) for radius in radii)
    assert critic[-1] < 0.02 * critic[0]


def regions() -> tuple[TrustRegions, LossesSeen, list[nn.Linear]]:
    """The regions of two layers with an optimizer each, which have stepped."""
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    losses = LossesSeen(nn.ModuleList(layers))
    found = TrustRegions(Settings(kl_clip="auto"), losses, Events())
    for layer, loss in zip(layers, (1.0, 100.0), strict=True):
        found.select(layer.parameters()).note_loss(loss, never_negative=True)
        losses.stepped(layer.parameters(), SGD(layer.parameters(), lr=0.5))
    return found, losses, layers


def test_a_poor_step_of_one_optimizer_leaves_the_radius_of_the_other() -> None:
    found, _, (first, second) = regions()
    poor = Outcome(loss_before=1.0, loss_after=1.5, slope=-1.0, curvature=0.1, penalty=0.1)
    found.select(first.parameters()).judge(poor, 0.001)
    assert found.present.radius == 0.0005
    assert found.select(second.parameters()).radius == START_RADIUS * 100
    assert found.select(first.parameters()).radius == 0.0005


def test_a_region_without_a_loss_of_its_own_has_the_unit_of_another() -> None:
    found, _, _ = regions()
    found.select(nn.Linear(2, 2).parameters())
    assert math.isnan(found.present.loss)
    found.give_unit()
    assert (found.present.loss, found.present.radius) == (1.0, START_RADIUS)


def test_reviews_that_have_ended_do_not_begin_for_a_new_optimizer() -> None:
    found, _, (first, _) = regions()
    assert found.end_reviews(fixed=False)
    assert not found.end_reviews(fixed=False)
    new = found.select(nn.Linear(2, 2).parameters())
    new.note_loss(10.0, never_negative=True)
    assert (new.reviews, new.adapts_radius, new.radius) == (False, True, UNREVIEWED_RADIUS * 10)
    assert not found.select(first.parameters()).reviews


def test_an_optimizer_that_takes_over_parameters_goes_on_with_their_region() -> None:
    found, losses, (first, second) = regions()
    whole = [*first.parameters(), *second.parameters()]
    assert found.select(whole).loss == 1.0
    losses.stepped(whole, SGD(whole, lr=0.5))
    assert found.select(second.parameters()).loss == 1.0
    assert not losses.of_several_optimizers


def test_a_state_holds_the_regions_of_all_optimizers() -> None:
    found, losses, (first, second) = regions()
    again = TrustRegions(Settings(kl_clip="auto"), losses, Events())
    again.load_state_dict(found.state_dict())
    for layer in (first, second):
        assert str(again.select(layer.parameters()).state_dict()) == str(found.select(layer.parameters()).state_dict())
