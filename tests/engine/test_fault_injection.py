"""A raise, a NaN or a SIGKILL at every hook and in every part of a due step; afterwards training can start again."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_kfc
from lightning_kfc import KFCCallback
from tests.helpers.harness import QUIET, Classifier, Watch, conv_net, fit, hooks_of, images, loader, trainer, weights

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in QUIET),
    pytest.mark.filterwarnings("ignore:KFCCallback skips this optimizer step"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:KFC at step .* Later ones are only counted:UserWarning"),
    pytest.mark.slow,
]

HOOKS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_validation_batch_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
    "teardown",
]

#: The parts of a due step: where they live, and what they are called there.
PARTS = [
    "kfc.KFC.capture",
    "estimation.recording.ForwardRecorder.attach",
    "estimation.recording.ForwardRecorder._record",
    "kfc.KFC.back_propagate",
    "estimation.loss_statistics.weighted_terms",
    "estimation.loss_statistics.seed_passes",
    "estimation.back_propagation._laid_out",
    "kfc.KFC.precondition",
    "engine.refreshes.Refreshes.before_step",
    "curvature.layer.Layer.fold",
    "curvature.layer.Layer.refreshed",
    "rules.natural.natural_step",
    "rules.natural.write_update",
]

#: The calls from which training goes on: of statistics after the first step, and of inverses at any time.
SURVIVED = [
    ("estimation.loss_statistics.weighted_terms", 2),
    ("estimation.loss_statistics.seed_passes", 2),
    ("estimation.back_propagation._laid_out", 2),
    ("curvature.layer.Layer.refreshed", 1),
    ("curvature.layer.Layer.refreshed", 2),
]


class Fault(Exception):  # noqa: N818 (a fault that is injected, not one that is found)
    """Raised on purpose."""


class Interrupt(BaseException):
    """Like Ctrl-C, not an Exception."""


class Validated(Classifier):
    """Validates, too, so that the hooks of validation are called."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


def part(path: str) -> tuple[Any, str]:
    """The object that holds a part, and the part's name in it."""
    *owners, name = path.split(".")
    found: Any = lightning_kfc
    for owner in owners:
        found = getattr(found, owner) if hasattr(found, owner) else __import__(f"lightning_kfc.{owner}", fromlist=["_"])
    return found, name


def nth_call(function: Callable[..., Any], number: int, act: Callable[[], None]) -> Callable[..., Any]:
    """The function, with something done before one of its calls."""
    calls = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return function(*args, **kwargs)

    return wrapped


def raising(kind: type[BaseException]) -> Callable[..., None]:
    def act(*args: Any, **kwargs: Any) -> None:
        raise kind("on purpose")

    return act


def assert_nothing_left(module: pl.LightningModule, used: pl.Trainer) -> None:
    assert hooks_of(module) == []
    assert "train_step_context" not in vars(used.precision_plugin)
    assert torch.overrides._get_current_function_mode() is None
    if "torch._dynamo" in sys.modules:
        assert torch._dynamo.eval_frame._stance.stance == "default"


def assert_trains_again(module: Classifier, kfc: KFCCallback) -> None:
    # Lightning leaves a module in evaluation mode where validation raised.
    module.train()
    before = weights(module)
    used = fit(module, kfc=kfc, max_steps=3)
    assert_nothing_left(module, used)
    assert not torch.equal(weights(module), before)
    assert all(layer.inverse is not None for layer in kfc.kfc.layers.values())
    assert bool(torch.isfinite(weights(module)).all())


@pytest.mark.parametrize("first", [False, True], ids=["after us", "before us"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_raise_in_another_callback_s_hook_leaves_nothing_attached(hook: str, first: bool, tmp_path: Path) -> None:
    module, kfc, other = Validated(), KFCCallback(), Watch(hook, raising(Fault))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    order = [other, kfc] if first else [kfc, other]
    used = trainer([*order, saving], max_steps=3, enable_checkpointing=True)
    with pytest.raises(Fault):
        used.fit(module, loader(), loader())
    assert_nothing_left(module, used)
    assert_trains_again(module, kfc)


@pytest.mark.parametrize("kind", [Fault, Interrupt, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2], ids=["first call", "second call"])
@pytest.mark.parametrize("path", PARTS)
def test_a_raise_in_any_part_of_a_due_step_leaves_nothing_attached(
    path: str, number: int, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kfc = Classifier(), KFCCallback()
    used = trainer([kfc], max_steps=3)
    owner, name = part(path)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, nth_call(getattr(owner, name), number, raising(kind)))
        if kind is Fault and (path, number) in SURVIVED:
            with pytest.warns(UserWarning, match="Fault: on purpose"):
                used.fit(module, loader())
            assert used.global_step == 3
        else:
            # Lightning turns Ctrl-C into an exit.
            with pytest.raises(SystemExit if kind is KeyboardInterrupt else kind):
                used.fit(module, loader())
    assert_nothing_left(module, used)
    assert_trains_again(module, kfc)


@pytest.mark.parametrize("where", ["forward", "loss", "data", "optimizer"])
def test_a_raise_in_the_user_s_own_code_leaves_nothing_attached(where: str) -> None:
    module, kfc = Classifier(), KFCCallback(damping=0.01, kl_clip=0.03)
    data = loader()
    fail = raising(Fault)
    if where == "forward":
        module.net[2].forward = nth_call(module.net[2].forward, 2, fail)
    elif where == "loss":
        module.loss = nth_call(module.loss, 2, fail)
    elif where == "data":
        data.collate_fn = nth_call(data.collate_fn, 2, fail)
    else:
        make = module.make_optimizer

        def failing(parameters: Any) -> torch.optim.Optimizer:
            made = make(parameters)
            made.step = nth_call(made.step, 2, fail)
            return made

        module.make_optimizer = failing
    used = trainer([kfc])
    with pytest.raises(Fault):
        used.fit(module, data)
    assert_nothing_left(module, used)
    if where == "optimizer":
        module.make_optimizer = make
    assert_trains_again(module, kfc)


def test_a_fit_that_failed_keeps_no_graph_alive() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def fail(used: Any, module: Any, loss: Tensor) -> None:
        kept.append(weakref.ref(loss))
        raise Fault

    module, kfc = Classifier(), KFCCallback()
    with pytest.raises(Fault):
        fit(module, kfc=kfc, callbacks=[Watch("on_before_backward", fail)])
    fit(module, kfc=kfc, max_steps=2)
    gc.collect()
    assert kept[0]() is None


# NaN.


def nan_in_gradients(module: Classifier) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.view(-1)[0] = math.nan


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_after_backward", "on_before_optimizer_step"])
def test_a_nan_that_a_hook_writes_into_gradients_reaches_no_weight_and_no_average(hook: str) -> None:
    module, kfc = Classifier(), KFCCallback()
    seen: list[tuple[bool, bool]] = []

    def spoil(used: Any, pl_module: Any, *args: Any) -> None:
        if used.global_step == 1:
            nan_in_gradients(pl_module)

    def look(*args: Any) -> None:
        factors = [f for layer in kfc.kfc.layers.values() for f in layer.factors.values()]
        seen.append((bool(torch.isfinite(weights(module)).all()), all(bool(torch.isfinite(f).all()) for f in factors)))

    used = trainer([Watch(hook, spoil), kfc, Watch("on_train_batch_end", look)], max_steps=4)
    used.fit(module, loader(images(32)))
    assert seen == [(True, True)] * 4
    # What a hook writes before zero_grad is gone by then.
    assert kfc.kfc.events.nonfinite_gradients == (0 if hook == "on_before_zero_grad" else 1)


@pytest.mark.parametrize("name", ["A", "G"])
def test_a_nan_in_a_factor_reaches_no_weight(name: str) -> None:
    """Memory can go bad, and a checkpoint can."""
    module, kfc = Classifier(), KFCCallback()

    def spoil(used: Any, pl_module: Any, *args: Any) -> None:
        if used.global_step == 2:
            kfc.kfc.layers["net.0"].averages[name].value.view(-1)[0] = math.nan

    with pytest.warns(UserWarning, match=r"'net\.0': .*the last good inverse is kept"):
        fit(module, kfc=kfc, callbacks=[Watch("on_train_batch_end", spoil)], max_steps=6, data=loader(images(48)))
    assert bool(torch.isfinite(weights(module)).all())
    assert kfc.kfc.events.failed_factorisations > 0


# SIGKILL.


def killed_run(folder: str) -> None:
    """Fork one training for each part and hook, killed there in its second step; called in a process of its own."""
    for path in [*PARTS, *HOOKS]:
        child = os.fork()
        if child == 0:
            owner, name = part(path) if path in PARTS else (KFCCallback, path)
            # The third call of a part with two layers, or the second of a hook, is in the second step.
            number = 3 if path.startswith(("layer", "capture")) else 2
            number = number if path in PARTS or "train_batch" in path or "before" in path or "after" in path else 1
            setattr(owner, name, nth_call(getattr(owner, name), number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            torch.manual_seed(0)
            saving = ModelCheckpoint(Path(folder) / path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
            used = trainer([KFCCallback(), saving], max_steps=4, enable_checkpointing=True)
            used.fit(Validated(conv_net()), loader(images(32)), loader(images(8)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(path, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("killed")
    root = Path(__file__).parents[2]
    code = (
        "import sys, torch; torch.set_num_threads(1); "
        "from tests.engine.test_fault_injection import killed_run; killed_run(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return folder, {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[0] in {*PARTS, *HOOKS}}


@pytest.mark.parametrize("path", [*PARTS, *HOOKS])
def test_a_run_killed_anywhere_goes_on_from_its_last_checkpoint(path: str, killed: tuple[Path, dict[str, int]]) -> None:
    folder, codes = killed
    assert codes[path] == -signal.SIGKILL
    checkpoints = sorted((folder / path).glob("step=*.ckpt"), key=lambda file: file.stat().st_mtime)
    module, kfc = Validated(conv_net()), KFCCallback()
    used = trainer([kfc], max_steps=6, max_epochs=3)
    used.fit(module, loader(images(32)), ckpt_path=checkpoints[-1] if checkpoints else None)
    assert_nothing_left(module, used)
    assert used.global_step == 6
    assert kfc.kfc.state_dict()["step"] == 6
    assert bool(torch.isfinite(weights(module)).all())
