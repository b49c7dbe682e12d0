"""The effect of clipping on updates is measured, and one advice is logged during a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD

from lightning_kfc import KFCCallback
from lightning_kfc.callback.clipping_watch import ClippingWatch
from lightning_kfc.monitoring.advice import CLIPPED_STEPS
from tests.helpers.harness import QUIET, Classifier, fit, loader

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class OwnClipping(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.03


class Manual(Classifier):
    """Clips the gradients of the loss, which KFC preconditions afterwards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=1e-6)
        optimizer.step()


class Norms(Callback):
    """The length of each update before and after clipping, by other means."""

    def __init__(self) -> None:
        self.factors: list[float] = []
        self._before: list[float] = []

    def _norm(self, module: Any) -> float:
        return float(torch.cat([p.grad.double().flatten() for p in module.parameters()]).norm())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._before.append(self._norm(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._before:
            self.factors.append(self._norm(pl_module) / self._before.pop())


def advice(caplog: pytest.LogCaptureFixture, module: Classifier, steps: int = 60, **options: Any) -> list[str]:
    with caplog.at_level("INFO"):
        fit(module, kfc=KFCCallback(), max_steps=steps, **options)
    return [line for line in caplog.messages if "gradient clipping shortened half" in line]


def gentle(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.5, momentum=0.5)


@pytest.mark.slow
def test_clipping_that_leaves_little_is_advised_on_once_after_a_window(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (line,) = advice(caplog, Classifier(optimizer=gentle), 2 * CLIPPED_STEPS + 10, gradient_clip_val=1e-4)
    assert f"the last {CLIPPED_STEPS} updates" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Classifier, {}),
        (Classifier, {"gradient_clip_val": 1e4}),
        (Manual, {}),
        (lambda optimizer: Classifier(optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9)), {"gradient_clip_val": 1e-4}),
    ],
)
@pytest.mark.filterwarnings("ignore:KFCCallback. a momentum of")
def test_other_clipping_is_silent(caplog: pytest.LogCaptureFixture, make: Any, options: dict[str, Any]) -> None:
    assert advice(caplog, make(optimizer=gentle), **options) == []


def test_clipping_of_the_modules_own_is_measured_too(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = advice(caplog, OwnClipping(optimizer=gentle))
    assert "to less than 0.03 of their length" in line


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    ],
)
def test_the_factors_are_those_of_the_gradients_lengths(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    found: list[ClippingWatch] = []
    original = ClippingWatch.__init__

    def kept(self: ClippingWatch, *args: Any) -> None:
        original(self, *args)
        found.append(self)

    monkeypatch.setattr(ClippingWatch, "__init__", kept)
    norms = Norms()
    data = loader(batch_size=4)
    fit(Classifier(optimizer=gentle), kfc=KFCCallback(), data=data, callbacks=[norms], max_steps=9, **options)
    (watch,) = found
    assert watch.factors() == pytest.approx(norms.factors, rel=1e-5)
    assert len(norms.factors) == 9
    assert min(watch.factors()) < 0.9
