"""A checkpoint takes the room that was stated before the first step, and reads what earlier versions saved."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFC, Precision
from lightning_kfc.factors.running_average import averages_of
from tests.helpers.nets import train_step


class Tokens(nn.Module):
    """An embedding whose input factor is a diagonal, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 60)
        self.head = nn.Linear(300, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x).flatten(1))


NETS = {
    "dense": (lambda: nn.Sequential(nn.Linear(250, 300), nn.Tanh(), nn.Linear(300, 200)), (16, 250)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(20, 140, 3),
            nn.GroupNorm(4, 140),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(560, 9),
        ),
        (16, 20, 6, 6),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(24, 48, 5, groups=4), nn.Flatten(), nn.Linear(48 * 4, 150)),
        (16, 24, 6, 6),
    ),
    "tokens": (Tokens, None),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "cholesky": {},
    "eigh": {"inverse": "eigh"},
    "ekfac": {"inverse": "ekfac"},
    "adam": {"rule": "adam"},
    "bfloat16": {"precision": Precision(inverses="bfloat16")},
    "diagonal": {"max_factor_dim": 200},
}


def trained(net: str, steps: int = 3, **settings: Any) -> tuple[KFC, int]:
    """An engine after some steps, and the bytes that it stated before them."""
    make, shape = NETS[net]
    model = make()
    kfc = KFC(model, **settings)
    stated = sum(row.bytes for row in kfc.coverage())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randint(0, 5000, (16, 5)) if shape is None else torch.randn(shape)
        y = torch.randint(0, 9, (16,))
        train_step(kfc, optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
    return kfc, stated


def saved_bytes(state: Any) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("net", NETS)
def test_a_saved_state_takes_the_bytes_that_were_stated_before_the_first_step(net: str, settings: str) -> None:
    kfc, stated = trained(net, **SETTINGS[settings])
    # Numbers and names take a few kB for any net.
    actual = saved_bytes(kfc.state_dict()) - saved_bytes(kfc.state_dict(factors=False))
    assert actual == pytest.approx(stated, rel=0.01), actual / stated
    assert sum(row.bytes for row in kfc.coverage()) == stated


def test_whole_factors_of_an_earlier_version_are_read_as_the_triangles_are() -> None:
    kfc, _ = trained("dense")
    state = kfc.state_dict()
    earlier = copy.deepcopy(state)
    for layer in earlier["layers"].values():
        whole = averages_of(layer["factors"], torch.device("cpu"))
        layer["factors"] = {
            name: {"value": stored.value, "weight": stored.average.weight, "squares": stored.average.squares}
            for name, stored in whole.items()
        }
    again, _ = trained("dense", steps=0)
    assert again.load_state_dict(earlier) == []
    for name, layer in kfc.layers.items():
        assert torch.equal(again.layers[name].A, layer.A)
        assert torch.equal(again.layers[name].G, layer.G)
    assert saved_bytes(again.state_dict()) == pytest.approx(saved_bytes(state), rel=0.001)
    narrower = nn.Sequential(nn.Linear(240, 300), nn.Tanh(), nn.Linear(300, 200))
    for each in (earlier, state):
        (problem,) = KFC(narrower).load_state_dict(each)
        assert "(1, 251, 251)" in problem
