"""The benchmark for accelerators, tried on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import accelerator
from benchmarks.contest.networks import resnet50
from benchmarks.cost.shapes import resnet50 as layer_shapes
from tests.helpers.harness import QUIET

pytestmark = [pytest.mark.filterwarnings(entry) for entry in QUIET]


def test_resnet50_has_the_parameters_and_the_layers_that_it_is_known_for() -> None:
    with torch.device("meta"):
        net = resnet50()
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    found = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            found.append((layer.weight[0].numel(), layer.out_channels))
        elif isinstance(layer, nn.Linear):
            found.append((layer.in_features + 1, layer.out_features))
    assert sorted(found) == sorted((layer.d_in, layer.d_out) for layer in layer_shapes())
    assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_later_steps_leave_out_the_first_thirty_and_the_first_ten_are_added_up() -> None:
    seconds = [5.0] * accelerator.FIRST + [100.0] * (accelerator.EARLY - accelerator.FIRST) + [1.0, 1.0, 4.0]
    assert accelerator.cost(seconds, unit=0.5) == {"first": 100, "median": 2, "mean": 4}


def test_a_loss_counts_as_reached_from_the_first_whole_pass_over_the_images_on() -> None:
    curve = {"losses": [0.1, 0.9, 0.8, 0.4], "seconds": [1.0, 2.0, 3.0, 4.0]}
    assert accelerator.reach(curve, 0.5, batches=2) == (4, 4.0)
    assert accelerator.reach(curve, 0.3, batches=2) == (math.inf, math.inf)


def test_without_an_accelerator_the_error_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        accelerator.main([])
    assert (
        "torch finds no accelerator: run this on a GPU, or try it with --device cpu --small" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_small_net_is_measured_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--device", "cpu", "--small", "--variants", "float32", "bf16", "--results", str(tmp_path)]
    accelerator.main(command)
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert found["measured_on"]["device"] == "cpu"
    assert set(found["cost"]) == {"float32", "bf16"}
    for entry in found["cost"].values():
        assert entry["sgd"] > 0
        assert entry["first"] > accelerator.FIRST
        assert entry["peak_sgd"] is entry["peak_kfc"] is None
    curves = found["convergence"]
    assert list(curves) == ["KFC, defaults", "SGD, lr 0.03", "SGD, lr 0.1"]
    assert all(len(curve["losses"]) == accelerator.SMALL.convergence_steps for curve in curves.values())
    assert curves["KFC, defaults"]["losses"][-1] < curves["KFC, defaults"]["losses"][0]
    assert (tmp_path / "accelerator.md").read_text().strip() in capsys.readouterr().out
