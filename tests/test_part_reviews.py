"""The first reviews look at the part of the batch that the statistics came from, later ones at the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.trust_region import REVIEWED_AT_FIRST
from tests.nets import classes, data, engine

N, PART = 24, 6
X, Y = data(N, 5), classes(N, count=3)


class Training:
    """A plain loop that keeps what each evaluation of a part, and each review, has seen."""

    def __init__(self, reduction: str = "mean", dropout: float = 0.0, lr: float = 0.1, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()
        self.reduction = reduction
        self.kfc = engine(self.model, **{"damping": "auto", "kl_clip": "auto", "factor_examples": PART, **settings})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.seen: list[tuple[tuple[int, ...], bool, float]] = []

    def loss(self, part: Any = slice(None)) -> Tensor:
        value = F.cross_entropy(self.model(X[part]), Y[part], reduction=self.reduction)
        self.seen.append((tuple(torch.arange(N)[part].tolist()), torch.is_grad_enabled(), value.item()))
        return value

    def step(self) -> Any:
        self.seen.clear()
        self.optimizer.zero_grad()
        with self.kfc.capture(self.loss, examples=N):
            loss = self.loss()
        self.kfc.update(loss)
        loss.backward()
        self.kfc.precondition(optimizer=self.optimizer)
        self.optimizer.step()
        return self.kfc.review(self.loss, optimizer=self.optimizer)


WHOLE = tuple(range(N))


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", N / PART)])
def test_a_first_review_compares_the_part_s_own_losses_on_the_scale_of_the_whole(reduction: str, scale: float) -> None:
    training = Training(reduction)
    verdict = training.step()
    assert [seen for seen, grad, _ in training.seen if not grad] == [WHOLE], "the first batch is looked at as a whole"
    assert verdict is not None
    verdict = training.step()
    (_, _, _), (part, with_gradients, before), (again, reviewed_with_gradients, after) = training.seen
    assert len(part) == PART
    assert with_gradients
    assert again == part
    assert not reviewed_with_gradients
    assert verdict.actual_decrease == pytest.approx(scale * (before - after), rel=1e-9)


def test_a_later_review_looks_at_the_whole_batch() -> None:
    training = Training()
    for _ in range(REVIEWED_AT_FIRST):
        training.step()
    assert training.kfc.step == REVIEWED_AT_FIRST - 1
    verdict = training.step()
    assert verdict is not None
    reviewed = [(seen, value) for seen, grad, value in training.seen if not grad]
    assert [seen for seen, _ in reviewed] == [WHOLE]
    assert len([seen for seen, grad, _ in training.seen if grad and len(seen) == PART]) == 1, "statistics are of a part"
    assert verdict.actual_decrease == pytest.approx(training.seen[0][2] - reviewed[0][1], rel=1e-9)


def test_dropout_falls_alike_before_and_after_the_step() -> None:
    training = Training(dropout=0.5, lr=1e-9)
    training.step()
    verdict = training.step()
    before, after = training.seen[1][2], training.seen[2][2]
    assert training.seen[1][0] == training.seen[2][0] != WHOLE
    assert after == pytest.approx(before, abs=1e-7)
    assert abs(verdict.actual_decrease) < 1e-7
    torch.manual_seed(5)
    with torch.no_grad():
        other = float(training.loss(torch.tensor(training.seen[1][0])))
    assert abs(other - before) > 1e-3, "else this shows nothing"


def test_a_step_that_makes_the_part_s_loss_grow_is_taken_back() -> None:
    training = Training(lr=0.1)
    training.step()
    weights = [parameter.detach().clone() for parameter in training.model.parameters()]
    precondition = training.kfc.precondition

    def against(**options: Any) -> bool:
        done = precondition(**options)
        for parameter in training.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(-20)
        return done

    training.kfc.precondition = against
    verdict = training.step()
    assert len(training.seen[-1][0]) == PART
    assert verdict.undo
    for parameter, before in zip(training.model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
