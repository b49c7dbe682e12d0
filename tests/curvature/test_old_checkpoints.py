"""A checkpoint of an earlier version goes on as the run that wrote it did.

The stored file was written by version 1 of the state: for each of some settings what :func:`trained` leaves after
``BEFORE`` steps, and the losses of the steps that followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from tests.helpers.nets import classes, data, double

STORED = Path(__file__).parent / "states_of_version_1.pt"
BEFORE, AFTER = 7, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {"damping": "auto", "kl_clip": "auto"},
    "adam": {"rule": "adam", "kl_clip": "auto"},
    "ekfac": {"inverse": "ekfac", "damping": 0.1},
}


class Run:
    """A tiny training whose batches depend on the step alone."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = double(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.5)
        self.kfc = KFC(self.model, warmup_steps=4, **SETTINGS[name])

    def train(self, begin: int, end: int) -> Tensor:
        """The losses of some steps."""
        losses = []
        for step in range(begin, end):
            x, y = data(6, 1, 4, 4, seed=10 + step), classes(6, count=3, seed=step)
            self.optimizer.zero_grad()
            with self.kfc.capture():
                loss = F.cross_entropy(self.model(x), y)
            self.kfc.update(loss)
            loss.backward()
            self.kfc.precondition(optimizer=self.optimizer)
            self.optimizer.step()
            self.kfc.review(optimizer=self.optimizer)
            losses.append(loss.detach())
        return torch.stack(losses)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kfc": self.kfc.state_dict(),
        }


def write() -> None:
    """Write the file: only for a new version of the state, under a new name."""
    stored = {}
    for name in SETTINGS:
        run = Run(name)
        run.train(0, BEFORE)
        state = run.state()
        stored[name] = {**torch.utils._pytree.tree_map(_copied, state), "losses": run.train(BEFORE, BEFORE + AFTER)}
    torch.save(stored, STORED)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


#: Automatic settings, and the epsilon of the rule "adam", have become relative since.
CHANGED = ("auto", "adam")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_version_1_goes_on_as_it_did_when_it_was_written(name: str) -> None:
    stored = torch.load(STORED, weights_only=True)[name]
    run = Run(name)
    run.model.load_state_dict(stored["model"])
    run.optimizer.load_state_dict(stored["optimizer"])
    assert run.kfc.load_state_dict(stored["kfc"]) == []
    for layer, state in stored["kfc"]["layers"].items():
        for factor, average in state["factors"].items():
            assert torch.equal(run.kfc.layers[layer].factors[factor], average["value"])
    losses = run.train(BEFORE, BEFORE + AFTER)
    if name in CHANGED:
        torch.testing.assert_close(losses[0], stored["losses"][0], rtol=1e-9, atol=0)
        return
    # Not to the last bit: another processor adds up in another order.
    torch.testing.assert_close(losses, stored["losses"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_has_the_keys_of_version_1_but_for_the_triangles_of_its_factors(name: str) -> None:
    def keys(value: Any) -> Any:
        if not isinstance(value, dict):
            return None
        if {"triangle", "shape"} <= value.keys():
            value = {"value": None, **{key: inner for key, inner in value.items() if key not in ("triangle", "shape")}}
        return {key: keys(inner) for key, inner in value.items()}

    stored = torch.load(STORED, weights_only=True)[name]["kfc"]
    run = Run(name)
    run.train(0, BEFORE)
    state = run.kfc.state_dict()
    # The units of automatic settings, the last review, what is known of the loss, the last updates and rates, frozen
    # layers, and statistics that wait are new.
    del state["factor_refresh"], state["last_updates"]
    del state["optimizers"], state["saturates"], state["added"], state["subtracted"]
    del state["due"]["frozen"]
    for new in (
        "loss",
        "first_loss",
        "stepped_at",
        "poor",
        "raised",
        "raised_from",
        "recent_slopes",
        "recent_losses",
        "earlier_losses",
    ):
        del state["trust_region"][new]
    state["trust_region"].pop("reviews", None)
    state["trust_region"].pop("rates", None)
    stored["trust_region"].pop("damping", None)
    for layer in state["layers"].values():
        layer.pop("own_damping", None)
        layer.pop("loss", None)
    assert keys({**state, "events": {}}) == keys({**stored, "events": {}})
    assert stored["events"].keys() <= state["events"].keys()
