"""After the warm-up each layer is inverted once a period, at a step of its own."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC, RefreshTiming
from lightning_kfc.trust_region.outcome import Verdict
from lightning_kfc.utilities.load_balancing import factorisation_cost
from tests.helpers.nets import classes, data, double, engine, train_step

WIDTHS = (6, 12, 9, 9, 5, 5, 5, 3)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return double(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)))


class Training:
    """A plain loop; notes who was inverted at each step."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        self.model = net() if model is None else model
        defaults = {
            "fisher": "mc",
            "factor_every_n_steps": 4,
            "inverse_every_n_steps": 12,
            "warmup_steps": 3,
            "damping": 0.1,
            "kl_clip": 1e-3,
        }
        self.kfc: KFC = engine(self.model, **{**defaults, **settings})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.inverted: list[list[str]] = []

    def loss(self, step: int) -> Tensor:
        return F.cross_entropy(self.model(data(8, WIDTHS[0], seed=step)), classes(8, count=WIDTHS[-1], seed=step))

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            step = len(self.inverted)
            train_step(self.kfc, self.optimizer, lambda step=step: self.loss(step))
            self.inverted.append([n for n, layer in self.kfc.layers.items() if layer.factorised_at == step])
        return self

    def cost(self, names: list[str]) -> float:
        return sum(factorisation_cost(self.kfc.layers[name].adapter.factor_shapes()) for name in names)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
@pytest.mark.parametrize("warmup", [0, 3, 6])
def test_no_step_after_the_warm_up_inverts_more_than_its_share(inverse: str, warmup: int) -> None:
    training = Training(inverse=inverse, warmup_steps=warmup).run(warmup + 5 * 12)
    after = [training.cost(names) for names in training.inverted[max(warmup, 1) :]]
    longest = max(training.cost([name]) for name in training.kfc.layers)
    assert max(after) == longest
    assert training.cost(list(training.kfc.layers)) > 2 * longest
    # Once in each period, at the same step of it.
    settled = training.inverted[warmup + 12 :]
    for first in range(0, len(settled) - 12 + 1):
        assert Counter(name for names in settled[first : first + 12] for name in names) == Counter(
            list(training.kfc.layers)
        )
    # Steps that take statistics are left to them.
    assert not any(names for step, names in enumerate(training.inverted) if step > warmup and step % 4 == 0)


def test_no_inverse_is_older_than_a_period_after_the_default_warm_up() -> None:
    training = Training(factor_every_n_steps=10, inverse_every_n_steps=20, warmup_steps=10)
    oldest = 0
    for _ in range(75):
        training.run(1)
        oldest = max(oldest, *(training.kfc.ages(name)[1] or 0 for name in training.kfc.layers))
    assert oldest <= 20


def test_an_inverse_is_made_from_the_latest_factors() -> None:
    training = Training().run(20)
    step = next(s for s in range(20, 32) if training.run(1).inverted[s])
    (name, *_) = training.inverted[step]
    layer = training.kfc.layers[name]
    expected = layer.refreshed(type(layer.inverse), 0.1, 0.0)
    for part, value in expected.state().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(layer.inverse.state()[part])), part


def test_without_staggering_all_are_inverted_at_the_dates_of_the_schedule() -> None:
    training = Training(timing=RefreshTiming(stagger_inverses=False)).run(40)
    everyone = list(training.kfc.layers)
    assert {s: names for s, names in enumerate(training.inverted) if names} == dict.fromkeys(
        (0, 1, 2, 4, 12, 24, 36), everyone
    )


def test_ekfac_changes_its_bases_only_with_statistics() -> None:
    training = Training(inverse="ekfac").run(40)
    dates = {step for step, names in enumerate(training.inverted) if names and step >= 3}
    assert dates <= {4 * k for k in range(10)}
    assert len(dates) > 40 // 12 + 1
    assert all(len(names) < len(training.kfc.layers) for names in training.inverted[3:])


def test_a_bad_review_has_all_layers_inverted_at_once_and_their_slots_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Training().run(17), Training().run(17)
    monkeypatch.setattr(two.kfc.reviewer, "review", lambda *args: Verdict(ratio=0.0, undo=False, refresh=True))
    two.kfc.review()
    for training in (one, two):
        training.run(24)
    assert two.inverted[17] == list(two.kfc.layers)
    assert one.inverted[18:] == two.inverted[18:]


def test_a_layer_that_misses_its_step_makes_up_for_it_at_its_next_one() -> None:
    training = Training()
    layers = list(training.model)
    late = torch.optim.SGD(layers[1].parameters(), lr=0.05)
    rest = torch.optim.SGD([p for i, m in enumerate(layers) if i != 1 for p in m.parameters()], lr=0.05)
    kfc, made = training.kfc, []
    for step in range(60):
        training.model.zero_grad()
        turn = late if step % 5 == 0 else rest
        with kfc.capture():
            loss = training.loss(step)
        kfc.back_propagate(loss)
        loss.backward()
        kfc.precondition(optimizer=turn)
        if kfc.layers["1"].factorised_at == step:
            made.append(step)
    assert all(step % 5 == 0 for step in made)
    ages = [after - before for before, after in itertools.pairwise(made)]
    # One period, and up to one turn more.
    assert max(ages) <= 12 + 5
    assert len([step for step in made if step >= 12]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
@pytest.mark.parametrize("at", [2, 3, 4, 9, 17, 20])
def test_a_resumed_run_keeps_the_slots_bit_for_bit(inverse: str, at: int) -> None:
    whole = Training(inverse=inverse).run(33)
    part = Training(inverse=inverse).run(at)
    resumed = Training(copy.deepcopy(part.model), inverse=inverse)
    resumed.inverted = list(part.inverted)
    assert resumed.kfc.load_state_dict(part.kfc.state_dict()) == []
    resumed.run(33 - at)
    assert resumed.inverted == whole.inverted
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_state_from_before_there_were_slots_is_taken_over() -> None:
    part, other = Training().run(9), Training()
    state = part.kfc.state_dict()
    del state["due"]["slots"]
    assert other.kfc.load_state_dict(state) == []
    other.inverted = [[]] * 9
    other.run(12)
    assert Counter(name for names in other.inverted[9:] for name in names) == Counter(list(other.kfc.layers))
