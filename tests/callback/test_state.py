"""A resumed run equals the uninterrupted one bit for bit, and missing parts of a checkpoint are reported."""

from __future__ import annotations

import copy
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

import lightning_kfc.pytorch_lightning
from lightning_kfc import KFCCallback, RefreshTiming
from lightning_kfc.factors.running_average import averages_of
from tests.helpers.lightning_nets import QUIET, ConvNet, Regression, images, loader, trainer, vectors
from tests.helpers.resumed_run import ByStep, new_callback, run

# The runs are short, and a long momentum is a part of the state that counts.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:KFCCallback. a momentum of 0.9")]


def differences(first, second, path="state"):
    """Where two nested states differ, bit for bit."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{path}: {first.keys() ^ second.keys()}"]
        return [d for key in first for d in differences(first[key], second[key], f"{path}.{key}")]
    if isinstance(first, list) and len(first) == len(second):
        return [d for i in range(len(first)) for d in differences(first[i], second[i], f"{path}[{i}]")]
    # A number that is not known yet is NaN.
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else str(first) == str(second)
    return [] if same else [f"{path}: {first} != {second}"]


def assert_same(module, callback, other, other_callback):
    assert differences(module.state_dict(), other.state_dict()) == []
    assert differences(callback.state_dict(), other_callback.state_dict()) == []


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one_bit_for_bit(tmp_path, accumulated):
    options = {"accumulate_grad_batches": accumulated}
    module, callback, _ = run(str(tmp_path / "whole"), **options)
    steps = 14 if accumulated == 1 else 8
    assert callback.kfc.step == steps - 1
    tried = 0
    for path in sorted((tmp_path / "whole").glob("*.ckpt")):
        assert "KFCCallback" in torch.load(path, weights_only=True)["callbacks"]
        again, resumed, fitted = run(str(tmp_path / "resumed"), ckpt_path=str(path), **options)
        assert fitted.global_step == steps
        assert_same(again, resumed, module, callback)
        tried += 1
    assert tried == steps


class BodyAndHead(ConvNet):
    """Manual optimization: one backward, after which two optimizers step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.5, momentum=0.5) for part in (self.body, self.head)]

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()


class Broken(ConvNet):
    """Some losses are NaN, whose steps are skipped."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.current_epoch in (0, 3, 4, 7) else loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:KFCCallback skips this optimizer step")
@pytest.mark.parametrize("kind", [BodyAndHead, Broken])
def test_runs_of_two_optimizers_and_of_skipped_steps_are_resumed_bit_for_bit(kind, tmp_path):
    def fitted(*callbacks, path=None):
        torch.manual_seed(3)
        module, callback = kind(), KFCCallback()
        torch.manual_seed(7)
        used = trainer(callback, *callbacks, max_epochs=12, enable_checkpointing=True)
        used.fit(module, loader(images(16), batch_size=16), ckpt_path=path)
        return module, callback

    whole = fitted(ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}"))
    for epoch in range(11):
        again = fitted(path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(*again, *whole)


@pytest.mark.slow
def test_a_run_that_was_killed_in_any_hook_is_resumed_bit_for_bit(tmp_path):
    hooks = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
    hooks += ["on_before_optimizer_step", "on_train_batch_end", "on_save_checkpoint", "on_train_epoch_end"]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.resumed_run", str(tmp_path), *hooks]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n") == [*(f"{hook} {int(signal.SIGKILL)}" for hook in hooks), ""], done.stderr
    module, callback, _ = run(str(tmp_path / "whole"))
    for hook in hooks:
        steps = {int(re.findall(r"\d+", path.stem)[0]): path for path in (tmp_path / hook).glob("*.ckpt")}
        assert 8 <= max(steps) <= 14, hook
        again, resumed, _ = run(str(tmp_path / f"{hook}-resumed"), ckpt_path=str(steps[max(steps)]))
        assert_same(again, resumed, module, callback)


class Recorded(Callback):
    """Notes at which steps statistics are taken and inverses refreshed."""

    def __init__(self):
        self.factors, self.inverses, self.damping = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.last = self.now(trainer)

    def now(self, trainer):
        layer = next(iter(trainer.callbacks[0].kfc.layers.values()))
        return layer.averages.get("A"), layer.inverse

    def on_train_batch_end(self, trainer, pl_module, *args):
        step, last = trainer.global_step - 1, self.last
        self.last = self.now(trainer)
        self.damping.append(trainer.callbacks[0].kfc.last_step.damping)
        self.factors += [step] * (self.last[0] is not last[0])
        self.inverses += [step] * (self.last[1] is not last[1])


def checkpoint_of(folder, step, **options):
    run(str(folder), **options)
    return str(folder / f"step={step}.ckpt")


def test_a_changed_schedule_takes_the_factors_over_and_then_rules(tmp_path):
    together = {"timing": RefreshTiming(stagger_inverses=False)}
    path = checkpoint_of(tmp_path, 7, callback=new_callback(**together))
    state = torch.load(path, weights_only=True)["callbacks"]["KFCCallback"]
    seen = Recorded()
    schedule = {"factor_every_n_steps": 5, "inverse_every_n_steps": 5, "warmup_steps": 0}
    callback = new_callback(**schedule, **together, damping=0.3, kl_clip=0.03)
    taken = []

    class Taken(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            taken.append(callback.kfc.layers["head"].A)

    run(str(tmp_path / "other"), seen, Taken(), callback=callback, ckpt_path=path)
    saved = averages_of(state["layers"]["head"]["factors"], torch.device("cpu"))
    assert torch.equal(taken[0], saved["A"].value[0])
    # The last statistics are those of step 4: by the new dates (5, 10) some are missing, and made up for.
    assert seen.factors == [8, 10]
    # The last inverse is that of step 6, which is later than the date 5.
    assert seen.inverses == [10]
    assert set(seen.damping) == {0.3}


class Changed(ConvNet):
    """The conv net's checkpoint, with another head and one more layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2 * 4 * 4, 3, dtype=torch.float64)
        self.extra = nn.Linear(3, 3, dtype=torch.float64)
        del self.body[1]
        self.strict_loading = False

    def forward(self, inputs):
        return self.extra(self.head(self.body(inputs)))

    def on_load_checkpoint(self, checkpoint):
        checkpoint["optimizer_states"] = []


def test_layers_that_fit_are_kept_and_the_others_are_reported(tmp_path):
    first = KFCCallback()
    fitted = trainer(first)
    fitted.fit(ConvNet(), loader(images()))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    kept = first.kfc.layers["head"].A
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append({name: dict(layer.averages) for name, layer in callback.kfc.layers.items()})

    callback = KFCCallback()
    again = trainer(callback, Seen(), max_epochs=2)
    with pytest.warns(UserWarning, match="KFCCallback") as said:
        again.fit(Changed(), loader(images()), ckpt_path=tmp_path / "a.ckpt")
    said = [str(w.message) for w in said if "KFCCallback" in str(w.message)]
    assert sorted(said) == [
        "KFCCallback: layer 'body.1' of the checkpoint is not in the model.",
        "KFCCallback: layer 'extra' is not in the checkpoint and starts anew.",
    ]
    assert torch.equal(seen[0]["head"]["A"].value[0], kept)
    assert seen[0]["extra"] == {}
    assert callback.kfc.step == 3
    assert callback.kfc.layers["extra"].inverse is not None


def test_a_layer_of_another_size_starts_anew_and_is_reported(tmp_path):
    class Wider(Regression):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 4, dtype=torch.float64)

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["optimizer_states"] = []

    fitted = trainer(KFCCallback())
    fitted.fit(Regression(), loader(vectors()))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    callback = KFCCallback()
    with pytest.warns(UserWarning, match=r"layer 'head' starts anew: its factors have shapes .*'G': \(1, 3, 3\)"):
        trainer(callback, max_epochs=2).fit(Wider(), loader(vectors()), ckpt_path=tmp_path / "a.ckpt")
    assert callback.kfc.layers["head"].G.shape == (4, 4)


@pytest.mark.parametrize("fitted_before", [False, True])
def test_from_a_checkpoint_without_the_callback_curvature_warms_up_and_this_is_reported(
    tmp_path, caplog, fitted_before
):
    path = checkpoint_of(tmp_path, 7, callback=Callback())
    callback, seen = new_callback(), Recorded()
    if fitted_before:
        # Factors of other weights than the checkpoint's must not be used.
        run(str(tmp_path / "before"), callback=callback)
    with caplog.at_level(logging.INFO):
        run(str(tmp_path / "resumed"), seen, callback=callback, ckpt_path=path)
    assert f"the checkpoint {path} holds no state of this callback" in caplog.text
    # The eighth step is the first one with the callback: statistics at 0, 1, 2 and 4 of the new count.
    assert seen.factors == [7, 8, 9, 11]


def test_after_a_checkpoint_of_weights_only_training_starts_with_a_warm_up(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, filename="a", save_weights_only=True)
    trainer(new_callback(), saving, enable_checkpointing=True).fit(ByStep(), loader(vectors(28)))
    path = tmp_path / "a.ckpt"
    assert "callbacks" not in torch.load(path, weights_only=True)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        run(str(tmp_path / "refused"), ckpt_path=str(path))
    # With a fixed bound, no review causes further statistics.
    callback, seen = new_callback(kl_clip=0.03), Recorded()
    module = ByStep.load_from_checkpoint(path)
    trainer(callback, seen).fit(module, loader(vectors(28)))
    assert seen.factors == [0, 1, 2, 4]


def test_without_factors_a_checkpoint_is_small_and_a_resumed_run_warms_up_and_reports_it(tmp_path):
    # With a fixed bound, no review causes further statistics.
    together = {"timing": RefreshTiming(stagger_inverses=False), "kl_clip": 0.03}
    path = checkpoint_of(tmp_path / "small", 7, callback=new_callback(save_factors=False, **together))
    state = torch.load(path, weights_only=True)["callbacks"]["KFCCallback"]
    assert state["layers"] is None
    assert not [value for value in state.values() if isinstance(value, torch.Tensor)]
    callback, seen = new_callback(save_factors=False, **together), Recorded()
    with pytest.warns(UserWarning, match="holds no factors: curvature is estimated anew, beginning with a warm-up"):
        run(str(tmp_path / "resumed"), seen, callback=callback, ckpt_path=path)
    assert seen.factors == [7, 8, 9, 11]
    assert seen.inverses == [7, 8, 9, 10, 13]
    # The schedule of the damping goes on.
    assert seen.damping[0] == pytest.approx(0.1 * 0.1**0.7)
    # What is saved after the restart goes on from the restart.
    again, seen = new_callback(save_factors=True, **together), Recorded()
    with pytest.warns(UserWarning, match="holds no factors"):
        run(str(tmp_path / "third"), seen, callback=again, ckpt_path=str(tmp_path / "resumed" / "step=9.ckpt"))
    assert seen.factors == [9, 10, 11, 13]


def tensors_in(state):
    if isinstance(state, dict | list):
        values = state.values() if isinstance(state, dict) else state
        return [tensor for value in values for tensor in tensors_in(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def test_the_stated_size_of_a_checkpoint_is_the_size_of_its_tensors(tmp_path):
    callback = KFCCallback()
    fitted = trainer(callback)
    fitted.fit(ConvNet(), loader(images()))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["KFCCallback"]
    assert callback.checkpoint_bytes() == sum(tensor.nbytes for tensor in tensors_in(state)) > 0
    fitted = trainer(KFCCallback(save_factors=False, average_weights=None))
    fitted.fit(ConvNet(), loader(images()))
    assert fitted.callbacks[0].checkpoint_bytes() == 0


def test_a_checkpoint_of_one_package_is_resumed_by_the_other(tmp_path):
    class Net(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3, dtype=torch.float64)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fitted = trainer(KFCCallback())
    fitted.fit(Regression(), loader(vectors()))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    callback = lightning_kfc.pytorch_lightning.KFCCallback()
    again = trainer(callback, trainer_class=pytorch_lightning.Trainer, max_epochs=2)
    again.fit(Net(), loader(vectors()), ckpt_path=tmp_path / "a.ckpt")
    assert callback.kfc.step == 3


def test_a_state_of_another_version_is_refused_by_name(tmp_path):
    fitted = trainer(KFCCallback())
    fitted.fit(Regression(), loader(vectors()))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["callbacks"]["KFCCallback"]["version"] = 99
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="cannot load a state of version 99"):
        trainer(KFCCallback(), max_epochs=2).fit(Regression(), loader(vectors()), ckpt_path=tmp_path / "a.ckpt")


def test_a_state_that_validate_has_loaded_does_not_enter_a_later_fit(tmp_path):
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    fitted = trainer(KFCCallback())
    fitted.fit(Validated(), loader(vectors(28)), loader(vectors()))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    callback = KFCCallback()
    again, module = trainer(callback), Validated()
    again.validate(module, loader(vectors()), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    again.fit(module, loader(vectors()), loader(vectors()))
    assert callback.kfc.step == 1


@pytest.mark.filterwarnings("ignore:.*lr_find")
def test_a_restore_in_the_middle_of_training_is_taken_over_at_once(tmp_path):
    class Later(LearningRateFinder):
        """Looks for a learning rate before the second epoch; Lightning then restores the checkpoint it made."""

        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before.append(copy.deepcopy(callback.state_dict()))
                self.lr_find(trainer, pl_module)
                after.append(copy.deepcopy(callback.state_dict()))

    before, after = [], []
    callback = KFCCallback()
    fitted = trainer(callback, Later(num_training_steps=4, update_attr=False), max_epochs=2, default_root_dir=tmp_path)
    fitted.fit(Regression(), loader(vectors()))
    assert differences(before[0], after[0]) == []
    assert callback.state_dict()["step"] == 4
    assert lightning.pytorch.Callback in KFCCallback.__mro__


@pytest.mark.filterwarnings("ignore:.*lr_find")
def test_training_after_a_learning_rate_finder_is_that_without_one_bit_for_bit(tmp_path):
    class Later(LearningRateFinder):
        """Looks for a learning rate before the second epoch, when a step of the first one is behind."""

        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    def fitted(*finders):
        torch.manual_seed(0)
        module, callback = Regression(), KFCCallback()
        trainer(callback, *finders, max_epochs=3, default_root_dir=tmp_path).fit(module, loader(vectors(16)))
        return module, callback

    assert_same(*fitted(), *fitted(Later(num_training_steps=4, update_attr=False)))


def test_a_run_resumed_just_before_a_layer_is_unfrozen_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    class Unfreezes(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.body, train_bn=False)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer, initial_denom_lr=1.0, train_bn=False)

    class Net(ConvNet):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.5)

    def fitted(*callbacks, path=None):
        torch.manual_seed(0)
        module, callback = Net(), KFCCallback(warmup_steps=3, factor_every_n_steps=5)
        used = trainer(callback, Unfreezes(), *callbacks, max_epochs=5, enable_checkpointing=True)
        used.fit(module, loader(images()), ckpt_path=path)
        return module, callback

    whole = fitted(ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}"))
    for epoch in (0, 1):
        assert_same(*fitted(path=tmp_path / f"epoch={epoch}.ckpt"), *whole)
