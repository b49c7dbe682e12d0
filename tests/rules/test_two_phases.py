"""A rule computes updates in one phase and writes them in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.curvature.gradients import gradients_of
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.monitoring.events import Events
from lightning_kfc.rules.base import ReadyLayer, Rule
from lightning_kfc.rules.choice import RULE_TYPES
from tests.helpers.nets import classes, data, engine


def ready_layer(layer: Layer) -> ReadyLayer:
    return ReadyLayer(layer, layer.trained_parameters(), layer.matrix(gradients_of(layer.trained_parameters())), 0.1)


def ready_layers(rule: str) -> tuple[nn.Module, list[ReadyLayer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    kfc = engine(model, damping=0.1, rule=rule, inverse="eigh" if rule == "adam" else "cholesky")
    with kfc.capture():
        loss = F.cross_entropy(model(data(8, 4)), classes(8, count=3))
    kfc.update(loss)
    loss.backward()
    return model, [ready_layer(layer) for layer in kfc.layers.values()]


def state_of(layer: Layer) -> tuple[Any, ...]:
    return layer.inverse, layer.previous_inverse, layer.moments, layer.rows


@pytest.mark.parametrize("name", RULE_TYPES)
def test_gradients_and_layers_stay_as_they_are_until_updates_are_written(name: str) -> None:
    model, ready = ready_layers(name)
    rule: Rule[Any] = RULE_TYPES[name]()
    gradients = [p.grad.clone() for p in model.parameters()]
    before = [state_of(entry.layer) for entry in ready]
    updates = rule.updates(ready, 0.1, 0.01)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))
    assert all(state_of(entry.layer) == old for entry, old in zip(ready, before, strict=True))
    rule.write(ready, updates, torch.optim.SGD(model.parameters(), lr=0.1), 4.0, 0, Events())
    for entry, update in zip(ready, updates.tensors, strict=True):
        written: Tensor = entry.layer.matrix(gradients_of(entry.parameters))
        # The rule "adam" has a learning rate of 0.02 times that of the optimizer.
        torch.testing.assert_close(written, 4.0 * update * (0.02 if name == "adam" else 1.0), rtol=1e-12, atol=0)


def test_the_rank_of_a_gradient_is_noted_on_its_layer_when_updates_are_written() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 160), nn.Tanh(), nn.Linear(160, 3)).double()
    kfc = engine(model, damping=0.1)
    with kfc.capture():
        loss = F.cross_entropy(model(data(6, 150)), classes(6, count=3))
    kfc.update(loss)
    layer = kfc.layers["0"]
    assert layer.rows == 6
    generator = torch.Generator().manual_seed(0)
    model[0].weight.grad = torch.randn(160, 150, generator=generator, dtype=torch.float64)
    model[0].bias.grad = torch.zeros(160, dtype=torch.float64)
    ready = [ready_layer(layer)]
    rule = RULE_TYPES["natural"]()
    updates = rule.updates(ready, 0.1, None)
    assert updates.rank_exceeded == (0,)
    assert layer.rows == 6
    rule.write(ready, updates, None, 1.0, 0, Events())
    assert layer.rows is None
