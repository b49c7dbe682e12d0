"""Attaching and detaching: nothing of the callback is left in trainer, module or optimizer, whatever ends the fit."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import signal

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

import lightning_kfc
import lightning_kfc.pytorch_lightning
from lightning_kfc import Categorical, KFCCallback
from lightning_kfc.estimation.recording import ForwardRecorder
from lightning_kfc.losses.recorder import LossRecorder
from tests.helpers.lightning_nets import (
    QUIET,
    ConvNet,
    Regression,
    images,
    loader,
    regression_factors,
    relative_error,
    trainer,
    vectors,
)
from tests.helpers.made import made

pytestmark = QUIET


def leftovers(fitted, module) -> list[str]:
    """The possible remains of a callback."""
    found = [f"plugin: {name}" for name in vars(fitted.precision_plugin) if name == "train_step_context"]
    for name, part in module.named_modules():
        found += [
            f"{name}: {kind}"
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            if vars(part)[kind]
        ]
    found += [f"{name}: gradient hook" for name, p in module.named_parameters() if p._post_accumulate_grad_hooks]
    found += ["optimizer hook" for optimizer in fitted.optimizers if optimizer._optimizer_step_post_hooks]
    return found


class Watching(ConvNet):
    """Notes what is attached within its training step, and may raise there."""

    def __init__(self, raising: BaseException | None = None, at: int = 1) -> None:
        super().__init__()
        self.raising, self.at, self.within = raising, at, []

    def training_step(self, batch, batch_idx):
        self.within.append(leftovers(self.trainer, self))
        loss = super().training_step(batch, batch_idx)
        if self.raising is not None and batch_idx == self.at:
            raise self.raising
        return loss


def test_nothing_is_left_attached_after_a_fit():
    module = Watching()
    fitted = trainer(KFCCallback())
    fitted.fit(module, loader(images()))
    assert any("_forward_hooks" in entry for entry in module.within[0]), module.within
    assert leftovers(fitted, module) == []


def test_nothing_is_left_attached_after_an_exception_in_training_step():
    module = Watching(ZeroDivisionError("mine"))
    fitted = trainer(KFCCallback())
    with pytest.raises(ZeroDivisionError, match="mine"):
        fitted.fit(module, loader(images()))
    assert leftovers(fitted, module) == []


def test_nothing_is_left_attached_after_ctrl_c():
    module = Watching(KeyboardInterrupt())
    fitted = trainer(KFCCallback())
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fitted.fit(module, loader(images()))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert leftovers(fitted, module) == []


HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
]
HOOKS += ["on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step"]
HOOKS += ["configure_gradient_clipping", "on_train_batch_end", "on_train_epoch_end", "on_train_end"]


@pytest.mark.parametrize("hook", HOOKS)
def test_after_an_exception_in_any_hook_nothing_is_left_and_another_fit_goes_on(hook):
    module, callback = ConvNet(), KFCCallback()
    original = getattr(module, hook)

    def raising(*args, **kwargs):
        if not hook.startswith(("on_train_batch", "on_before", "on_after", "backward", "optimizer", "configure")):
            raise ZeroDivisionError("mine")
        if module.global_step >= 1:
            raise ZeroDivisionError("mine")
        return original(*args, **kwargs)

    setattr(module, hook, raising)
    fitted = trainer(callback)
    with pytest.raises(ZeroDivisionError, match="mine"):
        fitted.fit(module, loader(images()))
    assert leftovers(fitted, module) == []
    del module.__dict__[hook]
    done = 0 if hook in HOOKS[:3] else callback.state_dict()["step"]
    again = trainer(callback)
    again.fit(module, loader(images()))
    assert leftovers(again, module) == []
    assert callback.kfc.last_step.step == done + 1
    assert all(layer.inverse is not None for layer in callback.kfc.layers.values())


def test_an_existing_context_of_the_plugin_is_put_back():
    fitted = trainer(KFCCallback())
    original = fitted.precision_plugin.train_step_context

    def own():
        return original()

    fitted.precision_plugin.train_step_context = own
    fitted.fit(Regression(), loader(vectors()))
    assert fitted.precision_plugin.train_step_context is own


def test_two_callbacks_for_two_parts_share_a_trainer_and_both_come_off():
    module = ConvNet()
    first, second = KFCCallback(include="body.*"), KFCCallback(include="head")
    fitted = trainer(first, second)
    fitted.fit(module, loader(images()))
    assert leftovers(fitted, module) == []
    assert set(first.kfc.layers) == {"body.0", "body.1"}
    assert set(second.kfc.layers) == {"head"}
    assert first.kfc.layers["body.0"].inverse is not None
    assert second.kfc.layers["head"].inverse is not None


def test_a_second_fit_of_the_same_module_goes_on_where_the_first_one_ended():
    module, callback = ConvNet(), KFCCallback(warmup_steps=2, factor_every_n_steps=100, inverse_every_n_steps=100)
    fitted = trainer(callback)
    fitted.fit(module, loader(images()))
    factors = callback.kfc.layers["head"].A.clone()
    fitted.fit_loop.max_epochs = 2
    fitted.fit(module, loader(images()))
    assert callback.kfc.step == 3
    assert torch.equal(callback.kfc.layers["head"].A, factors)
    assert leftovers(fitted, module) == []


def test_another_module_starts_anew():
    callback = KFCCallback()
    trainer(callback).fit(ConvNet(), loader(images()))
    trainer(callback).fit(Regression(), loader(vectors()))
    assert set(callback.kfc.layers) == {"head"}
    assert callback.kfc.step == 1


class Copying(Regression):
    """Copies and pickles itself in the middle of a due step, as weight averaging might."""

    def training_step(self, batch, batch_idx):
        self.logits = self.head(batch[0])
        loss = F.cross_entropy(self.logits, batch[1])
        self.logits = self.logits.detach()
        self.copies = [copy.deepcopy(self.head), pickle.loads(pickle.dumps(self.head))]
        for head in self.copies:
            F.cross_entropy(head(batch[0]), batch[1]).backward()
        self.calls = len(self.recorders[-1].calls)
        self.named = sum(term.value_edge is None for term in self.losses[-1].terms)
        return loss


@pytest.mark.parametrize("likelihood", ["auto", Categorical(output_of="head")])
def test_copies_of_the_module_made_in_a_due_step_record_nothing(likelihood):
    module = Copying()
    callback = KFCCallback(fisher="exact", likelihood=likelihood, damping=0.01, kl_clip=0.03)
    with made(ForwardRecorder) as module.recorders, made(LossRecorder) as module.losses:
        trainer(callback).fit(module, loader(vectors(), batch_size=8))
    A, G = regression_factors(module.logits, vectors().tensors[0], torch.full((8,), 1 / 8, dtype=torch.float64))
    assert (module.calls, module.named) == (1, 0 if likelihood == "auto" else 1)
    # The copies' forwards would have trebled the terms, and their backwards are not ours.
    assert relative_error(callback.kfc.layers["head"].A, A) < 1e-12
    assert relative_error(callback.kfc.layers["head"].G, G) < 1e-12
    step = callback.kfc.step
    for head in module.copies:
        F.cross_entropy(head(vectors().tensors[0]), vectors().tensors[1]).backward()
    assert callback.kfc.step == step


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copied_callback_holds_the_settings_and_nothing_of_the_model(copied):
    callback = KFCCallback(damping=0.5, include="head", save_factors=False)
    trainer(callback).fit(ConvNet(), loader(images()))
    twin = copied(callback)
    with pytest.raises(RuntimeError, match="exists only after trainer"):
        _ = twin.kfc
    assert twin.state_dict() == {}
    assert twin.state_key == callback.state_key
    trainer(twin).fit(ConvNet(), loader(images()))
    assert twin.kfc.settings.damping == 0.5
    assert set(twin.kfc.layers) == {"head"}


@pytest.mark.parametrize(
    ("package", "callback_class"),
    [(lightning.pytorch, KFCCallback), (pytorch_lightning, lightning_kfc.pytorch_lightning.KFCCallback)],
    ids=["lightning", "pytorch_lightning"],
)
def test_both_packages_train_with_the_callback(package, callback_class):
    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 3, dtype=torch.float64)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, callback = Net(), callback_class(kl_clip=None)
    plain = copy.deepcopy(module)
    trainer(callback, trainer_class=package.Trainer).fit(module, loader(vectors()))
    trainer(trainer_class=package.Trainer).fit(plain, loader(vectors()))
    assert callback.kfc.layers["head"].inverse is not None
    assert not torch.allclose(module.head.weight, plain.head.weight)


def test_a_callback_of_configure_callbacks_takes_part():
    class Configuring(Regression):
        def configure_callbacks(self):
            return [KFCCallback()]

    fitted = trainer()
    fitted.fit(Configuring(), loader(vectors()))
    (callback,) = (c for c in fitted.callbacks if isinstance(c, KFCCallback))
    assert callback.kfc.layers["head"].inverse is not None


def test_a_report_of_layers_and_checkpoint_size_is_printed_when_training_starts(caplog):
    with caplog.at_level(logging.INFO):
        fitted = trainer(KFCCallback(exclude="head"))
        fitted.fit(ConvNet(), loader(images()))
    (report,) = (record.getMessage() for record in caplog.records if "KFC preconditions" in record.getMessage())
    line = next(line.split() for line in report.splitlines() if line.startswith("body.0"))
    # 10 inputs of a patch with its bias, 2 channels; two matrices and two inverses in float64: 1664 bytes,
    # and the last update of 20 numbers.
    assert line == ["body.0", "Conv", "20", "A", "10,", "G", "2", "1.8", "kB"], report
    assert "Plain gradient (in exclude): head.weight, head.bias" in report
    size = sum(row.bytes for row in fitted.callbacks[0].kfc.coverage()) / 1e6
    assert f"Each checkpoint holds {size:.3f} MB of factors and inverses" in report


def test_the_report_is_printed_on_rank_zero_alone(caplog, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    fitted = trainer(KFCCallback())
    callback = fitted.callbacks[0]

    class Elsewhere(Regression):
        def on_fit_start(self):
            monkeypatch.setattr(rank_zero_only, "rank", 1)

    with caplog.at_level(logging.INFO):
        fitted.fit(Elsewhere(), loader(vectors()))
    assert callback.kfc.layers["head"].inverse is not None
    assert not [record for record in caplog.records if "KFC preconditions" in record.getMessage()]


class Validating(ConvNet):
    """Validates with gradients on."""

    def validation_step(self, batch, batch_idx):
        with torch.inference_mode(False), torch.enable_grad():
            inputs = batch[0].clone().requires_grad_()
            loss = F.cross_entropy(self(inputs), batch[1])
            assert loss.requires_grad
            loss.backward()
            self.zero_grad()
        assert not any(part._forward_hooks for part in self.modules())


def test_sanity_check_and_validation_with_gradients_record_nothing():
    factors = []
    for validated in (True, False):
        torch.manual_seed(1)
        module, callback = Validating(), KFCCallback(fisher="exact")
        options = {"val_check_interval": 1} if validated else {"limit_val_batches": 0, "num_sanity_val_steps": 0}
        fitted = trainer(callback, inference_mode=False, **options)
        fitted.fit(module, loader(images()), loader(images(seed=7)))
        factors.append(callback.kfc.layers["head"].A)
    assert torch.equal(*factors)


@pytest.mark.parametrize("raising", [False, True])
def test_validation_by_another_trainer_in_a_hook_of_a_fit_leaves_the_fit_as_it_is(raising):
    class Elsewhere(Callback):
        def on_train_epoch_end(self, trainer_of_fit, pl_module):
            pl_module.raises = raising
            with pytest.raises(ZeroDivisionError) if raising else contextlib.nullcontext():
                trainer(callback).validate(pl_module, loader(images()), verbose=False)
            pl_module.trainer = trainer_of_fit
            pl_module.train()

    class Validated(ConvNet):
        raises = False

        def validation_step(self, batch, batch_idx):
            return 1 / 0 if self.raises else super().training_step(batch, batch_idx)

    def fitted(*others):
        torch.manual_seed(0)
        module = Validated()
        trainer(callback, *others, max_epochs=3, limit_val_batches=0).fit(module, loader(images(16)), loader(images()))
        return module.state_dict(), callback.kfc.step

    callback = KFCCallback()
    alone = fitted()
    callback = KFCCallback()
    together = fitted(Elsewhere())
    assert alone[1] == together[1]
    assert all(torch.equal(own, together[0][name]) for name, own in alone[0].items())


def test_a_training_step_that_runs_while_the_callback_is_taken_out_is_not_recorded():
    class Noting(Regression):
        def training_step(self, batch, batch_idx):
            hooks.append(len(self.head._forward_hooks))
            return super().training_step(batch, batch_idx)

    class WithoutOthers(Callback):
        """Runs training steps as Lightning's finders do in the middle of a training: without other callbacks."""

        def on_train_start(self, trainer, pl_module):
            kept, trainer.callbacks = trainer.callbacks, [self]
            trainer.strategy.training_step(vectors().tensors, 0).backward()
            trainer.optimizers[0].step()
            trainer.optimizers[0].zero_grad()
            trainer.callbacks = kept

    hooks: list[int] = []
    trainer(KFCCallback(damping=0.01, kl_clip=0.03), WithoutOthers()).fit(Noting(), loader(vectors()))
    assert hooks == [0, 1, 1]


def test_a_resumed_run_may_plan_fewer_steps_than_were_made(tmp_path):
    first = trainer(KFCCallback(), max_epochs=2)
    first.fit(Regression(), loader(vectors(20), 4))
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(KFCCallback(), max_epochs=3, accumulate_grad_batches=4)
    resumed.fit(Regression(), loader(vectors(20), 4), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step > first.global_step
