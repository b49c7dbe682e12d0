"""Benchmarks that replace or drive a part of the engine work as documented."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import damping_limit, damping_unit, next_slope, noisy, variants
from benchmarks.accuracy.parameter_rule import NETS, RULES, Identity, iterations, refreshed_by
from benchmarks.away.tasks import AWAY, CHOOSING
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.cost.layer_cost import pieces
from lightning_kfc import KFC
from lightning_kfc.curvature import own_damping
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors import damping
from lightning_kfc.trust_region import region


class Shifted(nn.Module):
    """A linear layer, and a parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.shift)


def layer_after_a_step(rule: str) -> Layer:
    """The loose parameter's layer after a step by a rule for single parameters."""
    torch.manual_seed(0)
    model = Shifted()
    kfc = KFC(model, damping=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch.object(Layer, "refreshed", refreshed_by(RULES[rule], kfc.settings.ema_decay)):
        with kfc.capture():
            loss = F.cross_entropy(model(torch.randn(16, 6)), torch.arange(16) % 3)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
    return kfc.layers["shift"]


@pytest.mark.parametrize(("rule", "own"), [("diagonal", 1.0), ("blend", 0.5), ("mean", 0.0)])
def test_a_rule_for_single_parameters_makes_their_inverse(rule: str, own: float) -> None:
    layer = layer_after_a_step(rule)
    factor = layer.factors["F"]
    assert factor.std() > 0
    assert layer.inverse is not None
    expected = 1 / (own * factor + (1 - own) * factor.mean() + 0.1)
    torch.testing.assert_close(layer.inverse.F_inverse, expected)


def test_the_rule_without_curvature_marks_its_layers() -> None:
    assert isinstance(layer_after_a_step("matched").inverse, Identity)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["matched", "plain", "diagonal"])
def test_a_rule_for_single_parameters_trains(rule: str) -> None:
    assert iterations(next(iter(NETS)), rule, seed=0, steps=5, lr=0.1, damping=0.1) == math.inf


def test_the_pieces_of_a_layer_s_cost_run() -> None:
    parts = pieces("transposed 4 x 4, stride 2, 64 to 32 channels, 16 x 16", cost_rule=True)
    for part in (parts.own, parts.statistics, parts.inverse, parts.solve):
        part()


def test_a_table_of_variants_has_a_row_for_each_task_that_chooses_and_a_dash_where_nothing_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["variants", "--seeds", "3", "--results", str(tmp_path)])

    def row(task: Task, seeds: int) -> list[str]:
        return [variants.count([10.0, math.inf, 30.0][:seeds]), variants.count([math.inf, math.inf, 1.0])]

    variants.measure("made up", "made_up.md", "made up", ["one", "two"], row, [TASKS["resnet"]])
    lines = (tmp_path / "made_up.md").read_text("utf-8").splitlines()
    assert lines[:3] == ["Iterations to the hardest target, made up; medians of 3 seeds.", "", "| task | one | two |"]
    assert lines[4:] == [f"| {task.label} | 30 | - |" for task in (*(AWAY[n] for n in CHOOSING), TASKS["resnet"])]


@pytest.mark.filterwarnings("ignore:KFC at step")
@pytest.mark.filterwarnings("ignore:.*cannot review steps")
@pytest.mark.parametrize("name", noisy.SITUATIONS)
def test_each_noisy_training_is_measured_with_and_without_the_rule_of_a_stalled_loss(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = noisy.measured(noisy.SITUATIONS[name], seeds=1, steps=3)
    assert all(math.isfinite(value) for own in found for value in own)
    seen: list[tuple[bool, float]] = []

    def train(*_: object, with_kfc: bool, **__: object) -> float:
        seen.append((with_kfc, region.STALLED_SLOPE))
        return float(len(seen))

    before = region.STALLED_SLOPE
    monkeypatch.setattr(noisy, "train", train)
    assert noisy.measured(noisy.SITUATIONS[name], seeds=1, steps=3) == [[1.0], [2.0], [3.0]]
    assert seen == [(True, before), (True, 1.0), (False, before)]
    assert noisy.row("made up", [[1.0, 3.0, 2.0]]) == "| made up | 2 / 3 |"


def test_variants_change_constants_that_the_package_has_and_leave_them_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, ...]] = []

    def constants() -> tuple[Any, ...]:
        limits = damping.LARGEST_DAMPING, own_damping.LARGEST_CHANGE
        return region.DAMPING, region.NEXT_SLOPE, region.REVIEW_EVERY_N_STEPS, limits

    def record(*_: object, **__: object) -> float:
        seen.append(constants())
        return 1.0

    before = constants()
    monkeypatch.setattr(damping_unit, "iterations", record)
    assert damping_unit.row(TASKS["resnet"], 1) == ["1"] * 6
    assert [constant for constant, *_ in seen[1:]] == list(damping_unit.CONSTANTS)
    seen.clear()
    monkeypatch.setattr(damping_limit, "iterations", record)
    assert damping_limit.row(TASKS["resnet"], 1) == ["1"] * 6
    assert [limits for *_, limits in seen] == list(damping_limit.VARIANTS)
    seen.clear()
    monkeypatch.setattr(next_slope, "iterations", lambda *_: dict.fromkeys(next_slope.SHOWN, record()))
    assert next_slope.row(TASKS["resnet"], 1) == ["1 · 1"] * 5
    assert [tuple(changed) for _, *changed, _ in seen] == list(next_slope.VARIANTS.values())
    assert constants() == before
