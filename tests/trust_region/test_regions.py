"""A trust region for each optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

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


def game(rounds: int, **options: Any) -> tuple[KFC, nn.ModuleDict, dict[str, SGD]]:
    """Two covered layers and one that is not, with an optimizer each, which step in turn."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("a", "b", "uncovered")})
    kfc = KFC(model, exclude="uncovered", fisher="empirical", **options)
    optimizers = {name: SGD(model[name].parameters(), lr=0.1, momentum=0.5) for name in model}
    play(kfc, model, optimizers, range(rounds))
    return kfc, model, optimizers


def play(kfc: KFC, model: nn.ModuleDict, optimizers: dict[str, SGD], rounds: Iterable[int]) -> None:
    """Rounds of all optimizers; "b" steps in every third round alone."""
    for number in rounds:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        model.zero_grad()
        with kfc.capture():
            loss = sum((layer(x).square().mean() for layer in model.values()), torch.zeros(()))
        kfc.update(loss)
        loss.backward()
        for name, optimizer in optimizers.items():
            if name != "b" or number % 3 == 0:
                kfc.precondition(optimizer=optimizer)
                optimizer.step()
                kfc.review(optimizer=optimizer)


@pytest.mark.parametrize("rounds", [1, 2, 5, 11])
@pytest.mark.parametrize(("kl_clip", "damping"), [("auto", "auto"), (1e-3, 0.01), (1e-3, "auto")])
def test_runs_in_which_an_optimizer_rests_are_resumed_bit_for_bit(kl_clip: Any, damping: Any, rounds: int) -> None:
    kfc, model, optimizers = game(rounds, kl_clip=kl_clip, damping=damping)
    again, other, its_own = game(0, kl_clip=kl_clip, damping=damping)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(kfc.state_dict()))
    for name, optimizer in its_own.items():
        optimizer.load_state_dict(copy.deepcopy(optimizers[name].state_dict()))
    play(kfc, model, optimizers, range(rounds, 24))
    play(again, other, its_own, range(rounds, 24))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    if damping == "auto":
        assert str(kfc.state_dict()["trust_region"]) == str(again.state_dict()["trust_region"])


def test_many_steps_of_an_optimizer_without_covered_layers_leave_nothing_behind() -> None:
    kfc, model, optimizers = game(3, kl_clip="auto")
    held = len(kfc.state_dict()["last_updates"])
    for _ in range(20):
        for parameter in model["uncovered"].parameters():
            parameter.grad = torch.ones_like(parameter)
        kfc.precondition(optimizer=optimizers["uncovered"])
        optimizers["uncovered"].step()
        assert kfc.kl_clip is not None
        assert math.isfinite(kfc.kl_clip)
    assert len(kfc.state_dict()["last_updates"]) == held == 2


def test_optimizers_in_turn_over_the_whole_and_over_its_parts_have_no_ever_new_regions() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    losses = LossesSeen(nn.ModuleList([first, second]))
    found = TrustRegions(Settings(kl_clip="auto"), losses, Events())
    for _ in range(5):
        for parts in ([first, second], [first], [second]):
            parameters = [p for part in parts for p in part.parameters()]
            found.select(parameters).note_loss(1.0, never_negative=True)
            losses.stepped(parameters, SGD(parameters, lr=0.5))
    assert len(list(found)) == 2


def test_a_review_judges_the_region_of_the_step_that_it_reviews() -> None:
    kfc, model, optimizers = game(0, kl_clip="auto", damping=0.1)
    x = torch.randn(8, 3)
    with kfc.capture():
        loss = sum((layer(x).square().mean() for layer in model.values()), torch.zeros(()))
    kfc.update(loss)
    loss.backward()
    kfc.precondition(optimizer=optimizers["a"])
    kfc.precondition(optimizer=optimizers["b"])
    # Far too long, so that the review is poor.
    with torch.no_grad():
        for parameter in model["a"].parameters():
            parameter.add_(100.0)
    before = [region.radius for region in kfc.reviewer.regions]
    verdict = kfc.review(optimizer=optimizers["a"])
    assert verdict is not None
    assert verdict.undo
    after = [region.radius for region in kfc.reviewer.regions]
    assert after[0] < before[0]
    assert after[1] == before[1]


def test_the_end_of_one_regions_reviews_is_not_that_of_others() -> None:
    kfc, _, _ = game(1, kl_clip="auto")
    first, *others = kfc.reviewer.regions
    assert kfc.reviewer.end("a reason", region=first)
    assert not first.reviews
    assert all(other.reviews for other in others)
    assert kfc.reviewer.active
    assert kfc.reviewer.end("a reason")
    assert not kfc.reviewer.active
