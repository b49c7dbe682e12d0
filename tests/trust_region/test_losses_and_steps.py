"""Losses and the steps that are made of them belong together by identity, whatever a loop does with either."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from lightning_kfc import KFC, KFCCallback
from lightning_kfc.trust_region.losses_seen import LossesSeen
from lightning_kfc.trust_region.outcome import Outcome
from lightning_kfc.trust_region.region import TrustRegion
from lightning_kfc.trust_region.snapshot import StepSnapshot
from tests.helpers.lightning_nets import QUIET, Manual, Regression, loader, trainer, vectors

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


class Reviews:
    """Notes the outcome of each review."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Outcome] = []
        judge = TrustRegion.judge

        def noting(region: TrustRegion, outcome: Outcome, size: float) -> Any:
            self.found.append(outcome)
            return judge(region, outcome, size)

        monkeypatch.setattr(TrustRegion, "judge", noting)


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The losses that each step's bound was made of."""
    seen: list[list[float]] = []
    losses_of = LossesSeen.of

    def noting(self: LossesSeen, parameters: Any) -> Any:
        losses = losses_of(self, parameters)
        seen.append([float(loss.value) for loss in losses])
        return losses

    monkeypatch.setattr(LossesSeen, "of", noting)
    return seen


class Noted(Regression):
    """Notes the loss of each batch, and at which of them the weights have moved."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss


class SkipsBatches(Noted):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 2 else loss


class StepsEverySecondBatch(Noted):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_a_batch_without_a_loss_leaves_nothing_for_the_next_step(bounds: list[list[float]]) -> None:
    module, callback = SkipsBatches(), KFCCallback()
    trainer(callback, max_epochs=1).fit(module, loader(vectors(24), 2))
    made = [loss for number, loss in enumerate(module.losses) if number % 3 != 2]
    assert [losses for losses, _ in itertools.groupby(filter(None, bounds))] == [[loss] for loss in made]
    # The last batch has begun a step, and made none.
    assert callback.kfc.step == len(made)
    assert callback.kfc.events.missed_reviews == 0


@pytest.mark.usefixtures("ten_steps_reviewed")
def test_the_loss_of_a_batch_whose_gradient_is_thrown_away_is_no_part_of_the_next_step(
    bounds: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reviews = Reviews(monkeypatch)
    module, callback = StepsEverySecondBatch(), KFCCallback()
    trainer(callback, max_epochs=1).fit(module, loader(vectors(24), 2))
    made = module.losses[1::2]
    assert all(len(losses) < 2 for losses in bounds)
    assert [outcome.loss_before for outcome in reviews.found] == made
    assert callback.kfc.step == len(made) - 1


class StepsByHand(Noted):
    """Calls the closure, and then perhaps steps without one."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if batch_idx % 3:
            optimizer.step()
        else:
            optimizer.zero_grad()


@pytest.mark.usefixtures("ten_steps_reviewed")
def test_a_step_after_its_closure_is_reviewed_and_a_skipped_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = Reviews(monkeypatch)
    module, callback = StepsByHand(), KFCCallback()
    trainer(callback, max_epochs=1).fit(module, loader(vectors(24), 2))
    assert [outcome.loss_before for outcome in reviews.found] == [
        loss for number, loss in enumerate(module.losses) if number % 3
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.usefixtures("ten_steps_reviewed")
def test_a_review_measures_what_a_fresh_evaluation_of_the_step_s_batches_gives(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviews, fresh = Reviews(monkeypatch), []
    outcome_of = StepSnapshot.outcome

    def evaluate(before: StepSnapshot, layers: Any, damping: float, loss_before: float, loss_after: float) -> Any:
        # Pure steps: the old way, the step's batches once more.
        losses = [float(F.cross_entropy(module(x), y).detach()) for x, y in batches[-accumulate:]]
        fresh.append(sum(losses) / accumulate)
        return outcome_of(before, layers, damping, loss_before, loss_after)

    monkeypatch.setattr(StepSnapshot, "outcome", evaluate)

    class Keeping(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batches.append(batch)
            return super().training_step(batch, batch_idx)

    batches: list[Any] = []
    module = Keeping(lr=0.5)
    trainer(KFCCallback(), max_epochs=4, accumulate_grad_batches=accumulate).fit(module, loader(vectors(24), 4))
    assert len(fresh) >= 8
    assert [outcome.loss_after for outcome in reviews.found] == pytest.approx(fresh, rel=1e-12)


# Several optimizers.


class Adversarial(Regression):
    """Two networks, two optimizers, and losses that pass through both."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 3, dtype=torch.float64)
        self.together = together
        self.losses: dict[str, list[float]] = {"head": [], "other": []}

    def loss_of(self, batch: Any, sign: float) -> Tensor:
        inputs, targets = batch
        return sign * F.cross_entropy(self.other(self.head(inputs).tanh()), targets) + 2.0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for name, optimizer, sign in (("head", first, 1.0), ("other", second, -0.1)):
            optimizer.zero_grad()
            loss = self.loss_of(batch, sign)
            self.losses[name].append(float(loss.detach()))
            self.manual_backward(loss)
            if not self.together:
                optimizer.step()
        if self.together:
            first.step()
            second.step()

    def configure_optimizers(self) -> Any:
        return [SGD(self.head.parameters(), lr=0.05), SGD(self.other.parameters(), lr=0.05)]


@pytest.mark.usefixtures("ten_steps_reviewed")
def test_each_optimizer_s_step_is_reviewed_by_its_own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = Reviews(monkeypatch)
    module, callback = Adversarial(), KFCCallback(fisher="empirical")
    trainer(callback, max_epochs=1).fit(module, loader(vectors(24), 4))
    expected = [loss for pair in zip(module.losses["head"], module.losses["other"], strict=True) for loss in pair]
    found = [outcome.loss_before for outcome in reviews.found]
    # Once both optimizers are known. The first loss of a batch leaves a gradient in the other's network, too, which is
    # thrown away before that one's own backward.
    assert found[2:] == pytest.approx(expected[2:])
    assert callback.kfc.events.missed_reviews == 0


def test_a_step_before_which_other_weights_have_moved_is_not_reviewed(monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = Reviews(monkeypatch)
    module, callback = Adversarial(together=True), KFCCallback(fisher="empirical")
    trainer(callback, max_epochs=1).fit(module, loader(vectors(16), 4))
    # Of each batch the first optimizer's step; by the second one the first has moved what its loss depends on.
    assert len(reviews.found) == 4
    assert callback.kfc.events.missed_reviews == 4


def test_a_loss_of_0_with_a_gradient_is_no_missed_review() -> None:
    # Rounding: the probabilities of the other classes are 1e-18, which the gradient has and the loss has not.
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(42 * torch.eye(3))
    kfc, optimizer = KFC(model, damping=0.01, kl_clip="auto"), SGD(model.parameters(), lr=0.1)
    for _ in range(8):
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(torch.eye(3)), torch.arange(3))
        kfc.update(loss)
        loss.backward()
        assert float(loss.detach()) == 0
        assert model.weight.grad is not None
        assert float(model.weight.grad.abs().max()) > 0
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.review(optimizer=optimizer)
    assert kfc.events.missed_reviews == 0
    assert kfc.reviewer.active


def steps_of(optimizer_of: Any, sign: float, steps: int = 12) -> tuple[KFC, list[float]]:
    """Train on a loss times ``sign``; the loss of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    kfc, optimizer = KFC(model, kl_clip="auto"), optimizer_of(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(x), y)
            kept = sign * loss
        kfc.update(kept)
        kept.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.review(optimizer=optimizer)
        losses.append(float(loss.detach()))
    return kfc, losses


def test_a_loss_that_is_raised_is_reviewed_as_its_negative_that_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = Reviews(monkeypatch)
    _, losses = steps_of(lambda model: SGD(model.parameters(), lr=0.1), 1)
    lowered = [outcome.ratio for outcome in reviews.found]
    _, same = steps_of(lambda model: SGD(model.parameters(), lr=0.1, maximize=True), -1)
    raised = [outcome.ratio for outcome in reviews.found[len(lowered) :]]
    assert same == pytest.approx(losses, rel=1e-4)
    assert raised == pytest.approx(lowered, rel=1e-2)
    assert losses[-1] < losses[0]


def test_an_optimizer_that_raises_the_loss_in_some_groups_alone_is_not_reviewed() -> None:
    def both(model: Any) -> Optimizer:
        groups = [{"params": list(model[0].parameters()), "maximize": True}, {"params": list(model[2].parameters())}]
        return SGD(groups, lr=0.01)

    with pytest.warns(UserWarning, match="cannot review steps: the optimizer has maximize=True in some") as said:
        kfc, _ = steps_of(both, 1)
    assert len(said) == 1
    assert not kfc.reviewer.active


# Optimizers that wrap others, or call their closure again.


class SharpnessAware(Optimizer):
    """SAM, with a closure or in two steps (Foret et al. 2021)."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.0, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.base_optimizer = SGD(self.param_groups, lr=lr, momentum=momentum)
        self.param_groups = self.base_optimizer.param_groups
        self.rho = rho

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        for p in parameters:
            self.state[p]["away"] = p.grad * (self.rho / (norm + 1e-12))
            p.add_(self.state[p]["away"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["away"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss


WRAPPED: dict[str, Any] = {
    "SAM": lambda p, lr: SharpnessAware(p, lr),
    "SAM of a package": lambda p, lr: pytorch_optimizer.SAM(p, SGD, rho=0.05, lr=lr),
    "Lookahead": lambda p, lr: pytorch_optimizer.Lookahead(SGD(p, lr=lr, momentum=0.5), k=3),
    "ScheduleFree": lambda p, lr: pytorch_optimizer.ScheduleFreeSGD(p, lr=lr),
    "Lion": lambda p, lr: pytorch_optimizer.Lion(p, lr=lr / 100),
    "AdaBelief": lambda p, lr: pytorch_optimizer.AdaBelief(p, lr=lr / 10),
    "Nesterov": lambda p, lr: SGD(p, lr=lr, momentum=0.5, nesterov=True),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_optimizers_count_one_step_a_batch_and_end_where_they_should(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No review moves the weights of an optimizer that holds further weights."""
    module, callback = Regression(0.3, lambda p, lr: WRAPPED[name](p, lr)), KFCCallback()
    inputs, targets = vectors(16).tensors
    start = float(F.cross_entropy(module(inputs), targets).detach())
    moved: list[bool] = []
    review = KFC.review

    def watching(kfc: KFC, *, optimizer: Any = None) -> Any:
        before = [p.detach().clone() for p in module.parameters()]
        verdict = review(kfc, optimizer=optimizer)
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)))
        return verdict

    monkeypatch.setattr(KFC, "review", watching)
    fit = trainer(callback, max_epochs=10)
    fit.fit(module, loader(vectors(16), 8))
    assert callback.kfc.step == fit.global_step - 1 == 19
    assert callback.kfc.events.missed_reviews == 0
    assert callback.kfc.last_step.reduction_ratio == callback.kfc.last_step.reduction_ratio  # a number: reviewed
    if name != "Nesterov":
        assert not any(moved)
    assert float(F.cross_entropy(module(inputs), targets).detach()) < start


def test_a_closure_that_is_evaluated_again_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(KFCCallback(), max_epochs=3).fit(Regression(0.1, SharpnessAware), loader(vectors()))
    assert caplog.text.count("evaluates its closure several times in a step") == 1


class InTwoSteps(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            self.zero_grad()
            self.manual_backward(Regression.training_step(self, batch, batch_idx))
            step()

    def configure_optimizers(self) -> Any:
        return SharpnessAware(self.parameters(), 0.1)


def test_steps_that_lightning_does_not_see_are_reported_once_and_nothing_is_undone() -> None:
    callback = KFCCallback()
    with pytest.warns(UserWarning, match=r"could not precondition a step of SGD.*second_step"):
        trainer(callback, max_epochs=3).fit(InTwoSteps(), loader(vectors()))
    assert (callback.kfc.events.undone_steps, callback.kfc.events.shortened_steps) == (0, 0)


# Two callbacks.


@pytest.mark.usefixtures("ten_steps_reviewed")
def test_two_callbacks_hold_steps_against_the_gradient_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    slopes: list[tuple[float, float]] = []
    outcome_of = StepSnapshot.outcome

    class Two(Regression):
        def __init__(self) -> None:
            super().__init__(lr=0.5)
            self.body = nn.Linear(5, 5, dtype=torch.float64)

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(self.body(inputs).tanh())

        def on_after_backward(self) -> None:
            self.plain = {id(p): p.grad.clone() for p in self.parameters() if p.grad is not None}

    def noting(before: StepSnapshot, *arguments: Any) -> Outcome | None:
        found = outcome_of(before, *arguments)
        if found is not None:
            deltas = zip(before.parameters, before.values, strict=True)
            true = sum(float((module.plain[id(p)] * (p.detach() - value)).sum()) for p, value in deltas)
            slopes.append((found.slope, true))
        return found

    monkeypatch.setattr(StepSnapshot, "outcome", noting)
    module = Two()
    callbacks = [KFCCallback(include="head"), KFCCallback(include="body")]
    trainer(*callbacks, max_epochs=5).fit(module, loader(vectors(16), 8))
    assert len(slopes) == 2 * 10
    for used, true in slopes:
        assert used == pytest.approx(true, rel=1e-9)
    assert all(callback.kfc.reviewer.active for callback in callbacks)


def test_a_parameter_that_was_frozen_at_a_loss_has_no_part_in_it_when_it_is_trainable_again() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 1)
    losses = LossesSeen(nn.Sequential(first, second))
    second.requires_grad_(False)
    losses.note(second(first(torch.randn(4, 3))).mean(), 1.0, None)
    second.requires_grad_(True)
    assert len(losses.of(first.parameters())) == 1
    assert losses.of(second.parameters()) == []
