"""The optimizer's own features with the callback: schedules tuned for SGD, weight decay, averages of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback
from lightning_kfc.trust_region.outcome import Verdict
from lightning_kfc.trust_region.region import TrustRegion
from tests.helpers.harness import QUIET as HARNESS_QUIET
from tests.helpers.harness import Classifier, fit
from tests.helpers.lightning_nets import (
    QUIET,
    ConvNet,
    head_gradient,
    head_values,
    images,
    loader,
    relative_error,
    trainer,
)

pytestmark = [
    *QUIET,
    *(pytest.mark.filterwarnings(line) for line in HARNESS_QUIET),
    pytest.mark.filterwarnings("ignore:The `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

# Schedules.

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, max_lr=0.2, total_steps=steps),
    "cosine": CosineAnnealingLR,
}


class Scheduled(Classifier):
    """SGD with the learning rate, out of 0.03, 0.1, 0.2 and 0.4, that is best for SGD under both schedules."""

    def __init__(self, schedule: str) -> None:
        net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )
        super().__init__(net)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        schedule = SCHEDULES[self.schedule](optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 digits of scikit-learn in a fixed order, 360 of them held out."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16, torch.tensor(bunch.target)[order]
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def accuracy(schedule: str, kfc: KFCCallback | None) -> float:
    torch.manual_seed(0)
    train, held_out = digits()
    module = Scheduled(schedule)
    batches = DataLoader(train, batch_size=64, shuffle=True)
    fit(module, kfc=kfc, data=batches, max_epochs=4, max_steps=-1)
    x, y = held_out.tensors
    return float((module.net(x).argmax(1) == y).double().mean())


@pytest.mark.slow
# A momentum of 0.9 in so short a run is warned of; here it is the user's.
@pytest.mark.filterwarnings("ignore:KFCCallback. a momentum of")
@pytest.mark.filterwarnings("ignore:.*OneCycleLR cycles the momentum")
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_schedule_tuned_for_sgd_still_works(schedule: str) -> None:
    alone, preconditioned = accuracy(schedule, None), accuracy(schedule, KFCCallback())
    assert alone > 0.9
    assert preconditioned >= alone


# Weight decay.


class Noted(ConvNet):
    """Notes the gradients that its optimizer gets, and the weights before that."""

    def __init__(self, **options: float) -> None:
        torch.manual_seed(0)
        super().__init__(make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, **options))
        self.gradients: list[Tensor] = []
        self.values: list[Tensor] = []

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.gradients.append(head_gradient(self))
        self.values.append(head_values(self))


def noted(rule: str, **options: float) -> Noted:
    module = Noted(**options)
    trainer(KFCCallback(rule=rule, kl_clip=0.1, average_weights=None), max_epochs=2).fit(module, loader(images()))
    return module


@pytest.mark.parametrize("rule", ["natural", "adam"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_weight_decay_acts_apart_from_the_preconditioner(rule: str, momentum: float) -> None:
    decay, lr = 0.3, 0.1
    plain, decayed = noted(rule, momentum=momentum), noted(rule, momentum=momentum, weight_decay=decay)
    # The update is made of the loss's gradient alone; where SGD's momentum is taken out, its weight decay is as strong.
    ahead = decay * (1 / (1 - momentum) - 1) * decayed.values[0] if rule == "adam" else 0.0
    assert relative_error(plain.gradients[0] + ahead, decayed.gradients[0]) < 1e-12
    velocity = torch.zeros_like(decayed.gradients[0])
    ends = [*decayed.values[1:], head_values(decayed)]
    for gradient, before, after in zip(decayed.gradients, decayed.values, ends, strict=True):
        velocity = momentum * velocity + gradient + decay * before
        assert relative_error(after - before, -lr * velocity) < 1e-10
    assert relative_error(head_values(decayed), head_values(plain)) > 1e-2


# Averages.


class Weights(Callback):
    """Notes the weights of the head as each batch leaves them."""

    def __init__(self) -> None:
        self.start: Tensor | None = None
        self.steps: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = head_values(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.steps.append(head_values(pl_module))


@pytest.mark.parametrize("rule", ["natural", "adam"])
@pytest.mark.parametrize("averaging_first", [False, True])
def test_the_average_is_of_the_weights_that_training_really_had_also_where_a_step_was_undone(
    monkeypatch: pytest.MonkeyPatch, rule: str, averaging_first: bool
) -> None:
    judged = []

    def judge(self: TrustRegion, outcome: Any, size: float) -> Verdict:
        judged.append(size)
        return Verdict(1.0, undo=len(judged) == 3, refresh=False, kept_share=float(len(judged) != 3))

    monkeypatch.setattr(TrustRegion, "judge", judge)
    module, weights, callback, averaging = (
        ConvNet(lr=0.5 if rule == "adam" else 0.02),
        Weights(),
        KFCCallback(rule=rule),
        EMAWeightAveraging(decay=0.9),
    )
    pair = [averaging, callback] if averaging_first else [callback, averaging]
    trainer(*pair, weights).fit(module, loader(images(20)))
    assert len(judged) == len(weights.steps) == 5
    assert callback.kfc.events.undone_steps == 1
    assert torch.equal(weights.steps[2], weights.steps[1])
    assert not any(torch.equal(weights.steps[i], weights.steps[i - 1]) for i in (1, 3, 4))
    # The first step's weights begin the average.
    average = weights.steps[0]
    for values in weights.steps[1:]:
        average = 0.9 * average + 0.1 * values
    assert relative_error(head_values(module), average) < 1e-12
