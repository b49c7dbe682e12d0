"""Inverses that are made beside the training are those of the step at which they were due, one step late."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_kfc import KFCCallback
from lightning_kfc.background import Background
from lightning_kfc.diagnostics import bytes_held
from lightning_kfc.factors.inverse import INVERSES, CholeskyInverse, EighInverse, FactorisationError
from lightning_kfc.factors.statistics import Statistics
from tests.harness import QUIET
from tests.test_inverse_tolerance import same
from tests.test_inverses_in_training import Net, loader, trainer
from tests.test_staggering import Training

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
OFTEN = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4, "background_inverses": True}
CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lightning-kfc")]


def tensors(inverse: Any) -> dict[str, Any]:
    return {} if inverse is None else inverse.state()


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, Tensor) else value == two[key] for key, value in one.items()
    )


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert not [thread for thread in threads() if thread.is_alive()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stagger_inverses": False},
        {"inverse": "eigh"},
        {"rule": "adam"},
        {"factor_storage": "bfloat16"},
        {"factor_storage": "cpu"},
        {"max_factor_dim": 8},
        {"factor_every_n_steps": 1, "inverse_every_n_steps": 1},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_what_is_taken_over_is_the_inverse_of_the_step_at_which_it_was_due(options: dict[str, Any]) -> None:
    training = Training(**{**OFTEN, "damping": lambda step: 0.1 + 0.01 * step, **options})
    kfc, expected, seen = training.kfc, {}, 0
    for step in range(24):
        before = {name: layer.inverse for name, layer in kfc.layers.items()}
        training.run(1)
        for name, layer in kfc.layers.items():
            if name in expected:
                wanted = expected.pop(name)
                found = tensors(layer.inverse)
                # The damping of an inverse in the eigenbasis is that of the step that uses it.
                assert equal({**found, "damping": 0}, {**wanted, "damping": 0}), (step, name)
                seen += 1
            elif step:
                assert layer.inverse is before[name], (step, name)
            if kfc._due.refreshed_at(name)[1] == step and step:
                # Due at this step, at which nothing changes; the next one uses it, whatever the factors are by then.
                kind = layer.inverse_type(INVERSES[kfc.settings.inverse])
                made = kind.factorise(layer.curvature(), kfc.damping)
                expected[name] = tensors(made)
        if step == 0:
            assert all(layer.inverse is not None for layer in kfc.layers.values())
    kfc.join()
    assert seen > 2 * len(kfc.layers)


def test_ekfac_carries_over_what_was_learnt_meanwhile() -> None:
    training = Training(**{**OFTEN, "factor_every_n_steps": 1, "inverse_every_n_steps": 1}, inverse="ekfac").run(6)
    layer = training.kfc.layers["0"]
    bare = layer.inverse_type(INVERSES["ekfac"]).factorise(layer.curvature_of(layer.coming.averages), 0.1)
    old, fold, seen = layer.inverse, type(layer).fold_second_moment, []

    def noted(self: Any, moment: Tensor, decay: float) -> None:
        fold(self, moment, decay)
        if self is layer:
            seen.append(self.inverse)

    type(layer).fold_second_moment = noted
    try:
        training.run(1)
    finally:
        type(layer).fold_second_moment = fold
    training.kfc.join()
    # The step's own second moments were folded in the basis that its forward has seen, then carried over.
    (folded,) = seen
    assert folded.basis.same_as(old.basis)
    assert folded.weight > old.weight
    assert equal(tensors(layer.inverse), tensors(bare.succeeding(folded)))


@pytest.mark.parametrize("inverse", list(INVERSES))
def test_two_runs_are_the_same_however_long_the_thread_takes(inverse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Training(**OFTEN, inverse=inverse).run(20)
    first.kfc.join()
    kind = INVERSES[inverse]
    made, slow = kind.factorise.__func__, []

    def factorise(cls: Any, factors: Any, damping: float) -> Any:
        if threading.current_thread() in threads():
            slow.append(cls)
            time.sleep(0.02)
        return made(cls, factors, damping)

    monkeypatch.setattr(kind, "factorise", classmethod(factorise))
    second = Training(**OFTEN, inverse=inverse).run(20)
    second.kfc.join()
    assert same(first, second)
    assert len(slow) > 10


@pytest.mark.parametrize("inverse", list(INVERSES))
@pytest.mark.parametrize("tolerance", [0.0, 0.15])
@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(inverse: str, tolerance: float, at: int) -> None:
    options = {**OFTEN, "inverse": inverse, "inverse_tolerance": tolerance}
    whole, part = Training(**options).run(24), Training(**options).run(at)
    resumed = Training(copy.deepcopy(part.model), **options)
    resumed.inverted = list(part.inverted)
    state = copy.deepcopy(part.kfc.state_dict())
    under_way = [name for name, entry in state["layers"].items() if "coming" in entry]
    assert resumed.kfc.load_state_dict(state) == []
    resumed.run(24 - at)
    for training in (whole, part, resumed):
        training.kfc.join()
    assert same(whole, resumed)
    assert resumed.kfc.inverses_skipped == whole.kfc.inverses_skipped
    assert bool(tolerance) == (whole.kfc.inverses_skipped > 0)
    assert bool(under_way) == (at > 1)


def test_a_state_holds_the_factors_of_an_inverse_under_way_once() -> None:
    training = Training(**OFTEN, stagger_inverses=False, warmup_steps=0).run(5)
    training.kfc.join()
    layers = training.kfc.state_dict()["layers"]
    assert all(entry["coming"]["factors"] is None for entry in layers.values())
    held = bytes_held(training.kfc)
    layer = training.kfc.layers["0"]
    layer.fold(layer_statistics(training), 0.8)
    (entry,) = [e for n, e in training.kfc.state_dict()["layers"].items() if n == "0"]
    assert entry["coming"]["factors"].keys() == {"A", "G"}
    assert bytes_held(training.kfc) - held == sum(average.nbytes for average in layer.averages.values())


def layer_statistics(training: Training) -> Statistics:
    factors = training.kfc.layers["0"].factors
    return Statistics({"A": 2 * factors["A"]}, {"G": 2 * factors["G"]}, 1)


def test_a_state_of_the_other_setting_is_taken_over() -> None:
    part = Training(**OFTEN, stagger_inverses=False).run(5)
    part.kfc.join()
    wanted = {n: tensors(layer.refreshed(CholeskyInverse, 0.1)) for n, layer in part.kfc.layers.items()}
    other = Training(**{**OFTEN, "background_inverses": False}, stagger_inverses=False)
    assert other.kfc.load_state_dict(part.kfc.state_dict()) == []
    other.inverted = [[]] * 5
    other.run(1)
    for name, layer in other.kfc.layers.items():
        assert equal(tensors(layer.inverse), wanted[name])
        assert layer.coming is None


def test_what_the_thread_raises_is_raised_or_handled_where_training_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(**OFTEN, stagger_inverses=False).run(5)
    training.kfc.join()
    training.run(3)
    kfc, main = training.kfc, threading.main_thread()
    kept = {name: layer.inverse for name, layer in kfc.layers.items()}
    error: list[Exception] = [FactorisationError("told to fail")]

    def failing(factors: Any, damping: float) -> Any:
        assert threading.current_thread() is not main
        raise error[0]

    monkeypatch.setattr(CholeskyInverse, "factorise", staticmethod(failing))
    training.run(1)
    with pytest.warns(UserWarning, match=r"KFC at step 9, layer '\d': told to fail; the last good inverse is kept"):
        training.run(1)
    assert kfc.events.failed_factorisations == len(kept)
    assert {name: layer.inverse for name, layer in kfc.layers.items()} == kept
    error[0] = MemoryError("no room")
    training.run(3)
    with pytest.raises(MemoryError, match="no room"):
        training.run(1)
    kfc.join()


def test_after_a_bad_step_inverses_are_made_at_once_and_what_was_under_way_is_dropped() -> None:
    training = Training(**OFTEN, stagger_inverses=False, warmup_steps=0).run(5)
    kfc = training.kfc
    assert all(layer.coming is not None for layer in kfc.layers.values())
    kfc._due.hasten(kfc.layers, 5)
    training.run(1)
    kfc.join()
    for layer in kfc.layers.values():
        assert layer.coming is None
        assert equal(tensors(layer.inverse), tensors(layer.refreshed(CholeskyInverse, 0.1)))


def test_the_thread_works_while_training_goes_on_and_ends_when_told() -> None:
    background, go = Background(), threading.Event()
    job = background.begin(lambda: (go.wait(10), torch.is_grad_enabled(), threading.current_thread().name), CPU)
    (thread,) = threads()
    go.set()
    went, gradients, name = job.result()
    assert (went, gradients, name) == (True, False, thread.name)
    background.join()
    assert not thread.is_alive()
    # It can begin anew; what was not asked for yet is still there afterwards.
    late = background.begin(lambda: 3, CPU)
    background.join()
    assert late.result() == 3


class Boom(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError("told to")


def callback() -> KFCCallback:
    options = {"factor_every_n_steps": 2, "inverse_every_n_steps": 3, "warmup_steps": 1, "damping": 0.05}
    return KFCCallback(background_inverses=True, **options)


def test_no_thread_outlives_a_fit_or_its_exception(tmp_path: Path) -> None:
    kfc = callback()
    trainer(tmp_path, [kfc], 2, enable_checkpointing=False).fit(Net(), loader())
    assert threads() == []
    assert any(isinstance(layer.inverse, CholeskyInverse | EighInverse) for layer in kfc.kfc.layers.values())
    alive: list[int] = []

    class Count(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            alive.append(len(threads()))

    with pytest.raises(ZeroDivisionError, match="told to"):
        trainer(tmp_path, [callback(), Boom(), Count()], 2, enable_checkpointing=False).fit(Net(), loader())
    assert max(alive) == 1
    assert threads() == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_resumes_bit_for_bit_with_inverses_under_way(tmp_path: Path) -> None:
    def run(path: Path, epochs: int, **fit: Any) -> Net:
        model = Net()
        saver = ModelCheckpoint(dirpath=path, save_last=True, save_top_k=0)
        trainer(path, [callback(), saver], epochs).fit(model, loader(), **fit)
        return model

    whole = run(tmp_path / "whole", 6)
    assert sum(whole.losses[-4:]) < 0.8 * sum(whole.losses[:4])
    under_way = 0
    for epochs in (1, 2, 3, 4):
        path = tmp_path / str(epochs)
        run(path, epochs)
        saved = torch.load(path / "last.ckpt", weights_only=True)["callbacks"]["KFCCallback"]["layers"]
        under_way += sum("coming" in layer for layer in saved.values())
        resumed = run(path, 6, ckpt_path=path / "last.ckpt", weights_only=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (epochs, name)
    assert under_way > 0
