"""A resumed run equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFC, ExponentialSchedule
from tests.helpers.nets import classes, data, engine, small_conv_net, train_step

STEPS = 14


class Run:
    """A float32 training run that can be saved and resumed; its batches depend on the step alone."""

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.model = small_conv_net().float()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.5)
        defaults: dict[str, Any] = {
            "damping": ExponentialSchedule(0.1, 0.01, 10),
            "factor_every_n_steps": 3,
            "inverse_every_n_steps": 5,
            "warmup_steps": 4,
            "ema_decay": 0.8,
        }
        self.kfc = KFC(self.model, **{**defaults, **settings})
        self.step = 0

    def train(self, until: int) -> None:
        while self.step < until:
            x, target = (
                data(6, 2, 6, 6, seed=100 + self.step).to(self.model[0].weight.dtype),
                classes(6, count=3, seed=self.step),
            )
            train_step(self.kfc, self.optimizer, lambda x=x, t=target: F.cross_entropy(self.model(x), t))
            self.step += 1

    def train_with_reviews(self, until: int, *, stop_after: str = "") -> None:
        """Train as the callback does; or stop in the middle of the next step."""
        while self.step < until:
            with self.kfc.capture():
                loss = F.cross_entropy(
                    self.model(data(6, 2, 6, 6, seed=100 + self.step).float()), classes(6, count=3, seed=self.step)
                )
            if stop_after == "capture":
                return
            self.kfc.batches.follow_gradients()
            self.kfc.update(loss)
            if stop_after == "update":
                return
            self.optimizer.zero_grad()
            loss.backward()
            if stop_after == "backward":
                return
            self.kfc.precondition(optimizer=self.optimizer)
            if stop_after == "precondition":
                return
            self.optimizer.step()
            self.kfc.review(optimizer=self.optimizer)
            self.step += 1

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "kfc": self.kfc}
        torch.save({"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> list[str]:
        state = torch.load(file, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self.kfc.load_state_dict(state["kfc"])


@pytest.fixture(scope="module")
def uninterrupted() -> Run:
    run = Run()
    run.train(STEPS)
    return run


@pytest.mark.parametrize("at", range(STEPS))
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(uninterrupted: Run, at: int) -> None:
    first = Run()
    first.train(at)
    second = Run(seed=1)
    problems = second.load(first.save())
    assert problems == []
    second.train(STEPS)
    for (name, one), two in zip(uninterrupted.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two), f"{name}: largest difference {float((one - two).abs().max().detach()):.3g}"
    for name, layer in uninterrupted.kfc.layers.items():
        assert torch.equal(layer.A, second.kfc.layers[name].A), f"A of {name}"
        assert torch.equal(layer.G, second.kfc.layers[name].G), f"G of {name}"
    assert second.kfc.step == uninterrupted.kfc.step


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    # Adam divides the rounding of gradients that are 0 by itself.
    [
        ({}, 1e-5),
        ({"inverse": "eigh"}, 1e-5),
        ({"inverse": "ekfac"}, 1e-5),
        ({"rule": "adam", "damping": "auto"}, 0.01),
    ],
)
def test_a_run_resumed_in_another_precision_goes_on_with_what_was_learnt(
    dtypes: tuple[torch.dtype, torch.dtype], settings: dict[str, Any], tolerance: float
) -> None:
    # Targets that are drawn depend on the precision.
    first, second = (Run(seed=seed, fisher="empirical", **settings) for seed in (0, 1))
    before, after = dtypes
    first.model.to(before)
    second.model.to(after)
    first.kfc.restart()
    second.kfc.restart()
    first.train(7)
    assert second.load(first.save()) == []
    for name, layer in second.kfc.layers.items():
        assert {factor.dtype for factor in layer.factors.values()} == {after}
        assert relative(layer.A, first.kfc.layers[name].A) < 1e-6
    first.train(9)
    second.train(9)
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert relative(two, one) < tolerance
    assert second.kfc.events.state_dict() == first.kfc.events.state_dict()


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm().detach() / expected.double().norm().detach())


@pytest.mark.parametrize("after", ["capture", "update", "backward", "precondition"])
@pytest.mark.parametrize("at", [4, 5])
def test_a_run_that_is_rolled_back_within_a_step_ends_with_the_same_bits(at: int, after: str) -> None:
    def trained(rolled_back: str) -> Run:
        run = Run(kl_clip="auto", damping="auto", inverse_every_n_steps=3)
        run.train_with_reviews(3)
        state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.kfc.state_dict()))
        if rolled_back:
            run.train_with_reviews(at)
            run.train_with_reviews(at + 1, stop_after=rolled_back)
            run.step = 3
            run.model.load_state_dict(state[0])
            run.optimizer.load_state_dict(state[1])
            assert run.kfc.load_state_dict(state[2]) == []
        run.train_with_reviews(STEPS)
        return run

    once, again = trained(""), trained(after)
    for one, two in zip(once.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_resumed_without_the_state_does_not() -> None:
    # The control: the state is what makes it equal.
    one, two = Run(), Run()
    one.train(8)
    two.train(8)
    two.kfc = KFC(two.model, damping=0.1)
    one.train(STEPS)
    two.train(STEPS)
    assert not torch.equal(one.model[0].weight, two.model[0].weight)


def test_taking_the_state_changes_nothing_and_later_steps_do_not_change_it() -> None:
    one, two = Run(), Run()
    one.train(5)
    two.train(5)
    state = two.kfc.state_dict()
    A = state["layers"]["0"]["factors"]["A"]["triangle"]
    before = A.clone()
    one.train(9)
    two.train(9)
    assert torch.equal(A, before)
    assert torch.equal(one.model[0].weight, two.model[0].weight)


def plain(value: Any) -> bool:
    """Whether a state holds only what weights_only loading takes."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (torch.Tensor, int, float, str, bool, type(None))


def test_the_state_holds_only_tensors_numbers_strings_dicts_and_lists() -> None:
    run = Run()
    assert plain(run.kfc.state_dict())
    run.train(3)
    assert plain(run.kfc.state_dict())


def test_a_state_of_another_model_starts_the_layers_anew_that_do_not_fit_and_names_them() -> None:
    run = Run()
    run.train(3)
    other = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), nn.Flatten(), nn.Linear(4, 3))
    kfc = engine(other)
    problems = "\n".join(kfc.load_state_dict(run.kfc.state_dict()))
    assert "layer '5' of the checkpoint is not in the model" in problems
    assert "layer '4' is not in the checkpoint and starts anew" in problems
    assert "layer '0' starts anew" in problems
    assert not kfc.layers["0"].averages


def test_layers_that_are_left_out_now_are_said_to_be_so_and_not_to_be_missing() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "gone": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    state = KFC(model).state_dict()
    del model["gone"]
    problems = KFC(model, include="head").load_state_dict(state)
    left_out = [f"attention.{part}" for part in ("q", "k", "v", "out_proj")]
    assert problems == [
        *(f"layer {name!r} of the checkpoint is not preconditioned now" for name in left_out),
        "layer 'gone' of the checkpoint is not in the model",
    ]


def test_what_earlier_versions_have_saved_besides_is_left_out(uninterrupted: Run) -> None:
    first, second = Run(), Run(seed=1)
    first.train(8)
    state = torch.load(first.save(), weights_only=True)
    state["kfc"]["inverses_skipped"] = 7
    for entry in state["kfc"]["layers"].values():
        entry["origin"] = {"damping": 0.1, "sketches": {"A": torch.ones(1, 3, 3)}}
        entry["coming"] = {"step": 7, "damping": 0.1, "factors": None, "origin": None}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert second.load(file) == []
    second.train(STEPS)
    for one, two in zip(uninterrupted.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    saved = second.kfc.state_dict()
    assert "inverses_skipped" not in saved
    assert all({"origin", "coming"}.isdisjoint(entry) for entry in saved["layers"].values())


def test_a_state_of_an_unknown_version_is_an_error() -> None:
    run = Run()
    state = run.kfc.state_dict()
    state["version"] = 99
    with pytest.raises(ValueError, match="state of version 99"):
        run.kfc.load_state_dict(state)


def test_a_state_saved_with_a_layer_given_up_gives_it_up_again() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unseen = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(F.linear(x, self.unseen.weight, self.unseen.bias))

    model = Functional().double()
    kfc = engine(model)
    with kfc.capture():
        loss = F.cross_entropy(model(data(4, 3)), classes(4, count=3))
    with pytest.warns(UserWarning, match="'unseen'"):
        kfc.update(loss)
    kfc.precondition(lr=0.1)
    resumed = engine(model)
    assert resumed.load_state_dict(kfc.state_dict()) == []
    assert list(resumed.layers) == list(kfc.layers)
    with resumed.capture():
        loss = F.cross_entropy(model(data(4, 3)), classes(4, count=3))
    resumed.update(loss)
