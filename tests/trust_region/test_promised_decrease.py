"""A step may not promise more than the loss that there is, where the loss is seen to have no less than 0 in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.estimation.seeds import never_negative, weighted_terms
from lightning_kfc.losses.recorder import LossRecorder
from lightning_kfc.trust_region.region import MOST_PROMISED
from tests.helpers.nets import classes, data, double


def model_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return double(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), data(32, 6), classes(32, count=3)


def half(logits: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(logits, targets)


def penalised(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) + logits.square().mean()


def two_terms(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none").mean() + 0.1 * F.mse_loss(logits, torch.ones_like(logits))


def penalised_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, targets)
    loss += 0.3 * F.mse_loss(logits, torch.ones_like(logits))
    return loss


def with_a_bonus_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, targets)
    loss -= 0.5 * -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return loss


def shifted(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) - 0.5


def with_a_bonus(logits: Tensor, targets: Tensor) -> Tensor:
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return F.cross_entropy(logits, targets) - 0.1 * entropy


def subtracted(logits: Tensor, targets: Tensor) -> Tensor:
    return 3 * F.cross_entropy(logits, targets) - F.cross_entropy(logits, (targets + 1) % 3)


def no_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    return 10 + F.nll_loss(logits + 20, targets)


LOSSES: dict[Callable[[Tensor, Tensor], Tensor], bool] = {
    F.cross_entropy: True,
    half: True,
    penalised: True,
    two_terms: True,
    penalised_in_place: True,
    with_a_bonus_in_place: False,
    shifted: False,
    with_a_bonus: False,
    subtracted: False,
    no_probabilities: False,
}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("loss", "expected"), LOSSES.items())
def test_a_loss_is_never_negative_where_all_that_could_be_is_accounted_for(
    loss: Callable[[Tensor, Tensor], Tensor], expected: bool, precision: torch.dtype, scale: float
) -> None:
    model, inputs, targets = model_and_batch()
    recorder = LossRecorder()
    with recorder:
        value = loss(model(inputs).to(precision), targets) * scale
    terms = weighted_terms(value, recorder.terms, loss_scale=scale)
    assert never_negative(value, terms, scale) == expected


def test_a_loss_without_recognised_terms_may_be_anything() -> None:
    model, inputs, _ = model_and_batch()
    assert not never_negative(model(inputs).square().mean(), [], 1.0)


def first_steps(
    loss: Callable[[Tensor, Tensor], Tensor], steps: int = 6, micro_batches: int = 1, **settings: Any
) -> list[tuple[float, float]]:
    """Of each step, the loss before it, and what its slope promised."""
    model, inputs, targets = model_and_batch()
    # At such a rate a step promises more than there is, unless something keeps it from doing so.
    rate = 8.0
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    kfc = KFC(model, **{"damping": 1e-3, "kl_clip": "auto", "fisher": "exact", **settings})
    if kfc.settings.kl_clip == "auto":
        kfc.reviewer.region.radius = 1e6
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        parts = list(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True))
        for x, y in parts:
            with kfc.capture():
                value = loss(model(x), y) / micro_batches
            kfc.update(value, accumulate=micro_batches > 1)
            value.backward()
            total += float(value.detach())
        kfc.refresh()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        kfc.precondition(optimizer=optimizer)
        updates = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((total, rate * sum(float((g * u).sum()) for g, u in zip(gradients, updates, strict=True))))
        optimizer.step()
        kfc.review(optimizer=optimizer)
    return found


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_step_promises_more_than_twice_the_loss(micro_batches: int) -> None:
    steps = first_steps(F.cross_entropy, 12, micro_batches)
    bound = [promised / (MOST_PROMISED * loss) for loss, promised in steps]
    assert max(bound) <= 1 + 1e-9
    # It was this bound that held, not the radius.
    assert any(math.isclose(share, 1, rel_tol=1e-9) for share in bound)


@pytest.mark.parametrize("settings", [{"kl_clip": 1e6, "damping": "auto"}, {"kl_clip": None}])
def test_a_fixed_bound_is_the_paper_s_alone(settings: dict[str, Any]) -> None:
    assert max(promised / loss for loss, promised in first_steps(F.cross_entropy, 12, **settings)) > MOST_PROMISED


def test_a_loss_that_can_fall_below_0_bounds_nothing() -> None:
    def lowered(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets) - 1.0

    steps = first_steps(lowered, 12)
    assert any(loss > 0 and promised > MOST_PROMISED * loss for loss, promised in steps)


@pytest.mark.parametrize("bonus_first", [True, False])
def test_every_loss_of_a_step_counts(bonus_first: bool) -> None:
    model, inputs, targets = model_and_batch()
    kfc = KFC(model, kl_clip="auto", damping="auto", factor_every_n_steps=1)
    losses = [with_a_bonus, F.cross_entropy] if bonus_first else [F.cross_entropy, with_a_bonus]
    for _ in range(2):
        for loss in losses:
            with kfc.capture():
                value = loss(model(inputs), targets)
            kfc.update(value, accumulate=True)
            value.backward()
        kfc.precondition(lr=0.1)
        kfc.reviewer.cancel()
        assert kfc.state_dict()["never_negative"] is False
    with kfc.capture():
        value = F.cross_entropy(model(inputs), targets)
    kfc.update(value)
    value.backward()
    kfc.precondition(lr=0.1)
    assert kfc.state_dict()["never_negative"] is True


def test_an_unrecognised_loss_of_the_empirical_fisher_counts_too() -> None:
    model, inputs, targets = model_and_batch()
    kfc = KFC(model, kl_clip="auto", damping="auto", fisher="empirical")
    for loss in (F.cross_entropy, lambda z, y: -z.square().mean()):
        with kfc.capture():
            value = loss(model(inputs), targets)
        kfc.update(value, accumulate=True)
        value.backward()
    assert kfc.state_dict()["never_negative"] is False


def test_a_resumed_run_is_bounded_from_its_first_step_on() -> None:
    model, inputs, targets = model_and_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kfc = KFC(model, damping=1e-3, kl_clip="auto")
    with kfc.capture():
        loss = F.cross_entropy(model(inputs), targets)
    kfc.update(loss)
    loss.backward()
    kfc.precondition(optimizer=optimizer)
    other = KFC(model, damping=1e-3, kl_clip="auto")
    other.load_state_dict(kfc.state_dict())
    assert other.state_dict()["never_negative"] is True
