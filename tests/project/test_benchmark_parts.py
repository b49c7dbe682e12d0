"""Benchmarks that exchange a part of the engine, or drive one, do what they say."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.parameter_rule import RULES, Identity, refreshed_by
from benchmarks.cost.layer_cost import pieces
from lightning_kfc import KFC
from lightning_kfc.curvature.layer import Layer


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


def test_the_pieces_of_a_layer_s_cost_run() -> None:
    parts = pieces("transposed 4 x 4, stride 2, 64 to 32 channels, 16 x 16", cost_rule=True)
    for part in (parts.own, parts.statistics, parts.inverse, parts.solve):
        part()
