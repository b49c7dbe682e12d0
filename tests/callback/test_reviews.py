"""Reviews of steps under Lightning do not change the run, and a message reports their end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_kfc import KFCCallback
from lightning_kfc.trust_region import region
from lightning_kfc.trust_region.outcome import Verdict
from lightning_kfc.trust_region.region import TrustRegion
from tests.helpers.lightning_nets import CLASSES, QUIET, ConvNet, Manual, Regression, images, loader, trainer, vectors

pytestmark = QUIET


class Watchful(ConvNet):
    """Notes all that a second call of its training_step could leave behind."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)
        self.dropout = nn.Dropout(0.5)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.outputs: list[torch.Tensor] = []
        self.seen: dict[str, int] = {"batches": 0}
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        logits = self.head(self.dropout(self.body(inputs)))
        loss = F.cross_entropy(logits, targets)
        self.accuracy(logits, targets)
        self.outputs.append(loss.detach())
        self.seen["batches"] += 1
        self.calls += 1
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}


def run(callback: Any, path: Any, epochs: int = 2, **options: Any) -> Any:
    torch.manual_seed(1)
    module = Watchful()
    logger = CSVLogger(str(path), flush_logs_every_n_steps=1)
    fit = trainer(callback, max_epochs=epochs, logger=logger, log_every_n_steps=1, **options)
    fit.fit(module, loader(images(16), batch_size=4))
    rows = (path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    return module, rows, torch.rand(3)


@pytest.mark.slow
@pytest.mark.usefixtures("ten_steps_reviewed")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_a_run_does_not_notice_its_reviews(tmp_path, monkeypatch, options):
    reviews = []

    def indifferent(self, outcome, size):
        reviews.append(outcome)
        return Verdict(outcome.ratio, undo=False, refresh=False)

    monkeypatch.setattr(TrustRegion, "judge", indifferent)
    monkeypatch.setattr(region, "NEXT_SLOPE", 0.0)
    # It is not by a review that a step is kept from promising more than the loss that there is.
    monkeypatch.setattr(region, "MOST_PROMISED", math.inf)
    settings = {"ema_decay": 0.5}
    callback = KFCCallback(**settings)
    reviewed = run(callback, tmp_path / "reviewed", **options)
    assert len(reviews) == (4 if options else 8)
    # Where nothing adapts it, the bound stays at its start value.
    plain = run(KFCCallback(kl_clip=callback.kfc.kl_clip, **settings), tmp_path / "plain", **options)
    assert len(reviews) == (4 if options else 8)
    for name, value in plain[0].state_dict().items():
        assert torch.equal(value, reviewed[0].state_dict()[name]), name
    assert torch.equal(plain[2], reviewed[2])  # the random stream that follows
    assert reviewed[0].calls == reviewed[0].seen["batches"] == len(reviewed[0].outputs) == 8
    own = ("loss_step", "loss_epoch", "accuracy")
    assert _columns(plain[1], own) == _columns(reviewed[1], own)


def _columns(rows: str, names: tuple[str, ...]) -> list[list[str]]:
    """The user's own metrics in a CSV log, without empty rows."""
    lines = [line.split(",") for line in rows.splitlines()]
    places = [lines[0].index(name) for name in names]
    found = [[line[place] for place in places] for line in lines]
    return [line for line in found if any(line)]


@pytest.mark.usefixtures("ten_steps_reviewed")
def test_reviews_see_the_loss_that_the_step_had_and_with_the_same_dropout(tmp_path, monkeypatch):
    outcomes = []
    monkeypatch.setattr(
        TrustRegion, "judge", lambda self, found, size: (outcomes.append(found), Verdict(1.0, False, False))[1]
    )
    module, _, _ = run(KFCCallback(), tmp_path)
    for found, loss in zip(outcomes, module.outputs, strict=True):
        assert found.loss_before == float(loss)
        # With another mask the loss of the second evaluation would be anywhere.
        assert abs(found.loss_after - found.loss_before) < 3 * abs(found.slope) + 1e-3


def test_a_learning_rate_that_would_blow_an_excluded_layer_up_is_undone_step_by_step():
    # The clip bounds the covered layers alone; the head takes plain gradient steps, a thousand times too long.
    callback = KFCCallback(exclude="head")
    module = ConvNet(lr=1e3)
    first = float(F.cross_entropy(module(images().tensors[0]), images().tensors[1]).detach())
    trainer(callback, max_epochs=8).fit(module, loader(images(), batch_size=8))
    assert callback.kfc.events.undone_steps > 0
    module.train()
    assert float(F.cross_entropy(module(images().tensors[0]), images().tensors[1]).detach()) < 2 * first


def test_a_resumed_run_has_the_radius_and_damping_of_the_interrupted_one(tmp_path):
    callback = KFCCallback()
    fit = trainer(callback, max_epochs=4)
    fit.fit(Regression(lr=0.5), loader(vectors()))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    resumed, found = KFCCallback(), []

    class Started(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append((resumed.kfc.damping, resumed.kfc.kl_clip))

    going_on = trainer(resumed, Started(), max_epochs=5)
    going_on.fit(Regression(lr=0.5), loader(vectors()), ckpt_path=tmp_path / "last.ckpt")
    assert found[0] == (callback.kfc.damping, callback.kfc.kl_clip)
    assert callback.kfc.damping > 0


class NeedsGradients(Regression):
    """Cannot be evaluated without gradients, and notes its calls."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        loss = super().training_step(batch, batch_idx)
        torch.autograd.grad(loss, self.head.bias, retain_graph=True)
        return loss


@pytest.mark.parametrize("module_class", [Manual, NeedsGradients])
def test_manual_steps_and_steps_that_need_gradients_are_reviewed(module_class):
    callback = KFCCallback()
    trainer(callback, max_epochs=4).fit(module_class(), loader(vectors()))
    assert callback.kfc.reviewer.active
    assert callback.kfc.events.missed_reviews == 0
    assert callback.kfc.last_step.reduction_ratio is not None


class Unrepeatable(Regression):
    """Changes the size of a tensor's memory, which a replay cannot do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.zeros(2).resize_(3)
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_replayed_is_named_once_with_the_bound_that_is_used():
    callback = KFCCallback()
    with pytest.warns(UserWarning, match=r"cannot review steps.*aten\.resize_.*the next batch alone"):
        trainer(callback, max_epochs=4).fit(Unrepeatable(), loader(vectors()))
    assert not callback.kfc.reviewer.active
    assert callback.kfc.kl_clip > 0
    assert callback.kfc.events.undone_steps == 0


class Deceptive(Regression):
    """Reads numbers that NumPy has changed behind torch's back: a replay sees others."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        scale = torch.ones(1, dtype=inputs.dtype)
        scale.numpy()[0] = 2.0
        return F.cross_entropy(self.head(inputs * scale), targets)


def test_a_replay_that_does_not_give_the_loss_again_ends_the_reviews_before_anything_is_undone():
    callback = KFCCallback()
    with pytest.warns(UserWarning, match=r"a replay with the same weights gives the loss"):
        trainer(callback, max_epochs=4).fit(Deceptive(), loader(vectors()))
    assert not callback.kfc.reviewer.active
    assert callback.kfc.kl_clip > 0
    assert (callback.kfc.events.undone_steps, callback.kfc.events.shortened_steps) == (0, 0)


class DeceptiveLater(Deceptive):
    """Is honest at the first step, by which replays are checked."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 0:
            inputs, targets = batch
            return F.cross_entropy(self.head(inputs), targets)
        return super().training_step(batch, batch_idx)


def test_no_step_is_undone_because_of_a_replay_that_is_wrong_later():
    callback = KFCCallback()
    with pytest.warns(UserWarning, match=r"a replay with the same weights gives the loss"):
        trainer(callback, max_epochs=8).fit(DeceptiveLater(lr=50.0), loader(vectors()))
    assert (callback.kfc.events.undone_steps, callback.kfc.events.shortened_steps) == (0, 0)
