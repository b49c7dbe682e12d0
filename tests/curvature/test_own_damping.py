"""The damping of one layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.curvature.own_damping import LARGEST_CHANGE, OwnDamping
from lightning_kfc.factors.damping import LARGEST_DAMPING, LARGEST_NOISE_DAMPING
from lightning_kfc.factors.inverses import CholeskyInverse, FactorisationError, Inverse

CURVATURE = {"A": torch.eye(3).unsqueeze(0), "G": 2 * torch.eye(2).unsqueeze(0)}


def test_the_user_s_damping_is_never_limited() -> None:
    own = OwnDamping().limited(1e6, 1e6, CURVATURE)
    assert own.of(1e6) == 1e6
    assert own.of(7.0) == 7.0
    assert own.largest_change == math.inf


def test_an_automatic_damping_within_the_curvature_is_in_units_of_the_weights_and_bounds_no_update() -> None:
    own = OwnDamping(mean_square=0.01)
    assert own.of(0.5) == pytest.approx(50.0)
    own = own.limited(0.5, 0.0, CURVATURE)
    assert own.of(0.5) == pytest.approx(50.0)
    # The next loss is that of the next refresh.
    assert own.of(0.1) == pytest.approx(50.0)
    assert own.largest_change == math.inf


def test_a_lowered_damping_bounds_the_change_of_the_weights_by_their_size() -> None:
    own = OwnDamping(mean_square=0.01).limited(100.0, 0.0, CURVATURE)
    assert own.of(100.0) == pytest.approx(LARGEST_DAMPING * 2.0)
    assert own.largest_change == pytest.approx(LARGEST_CHANGE * 0.1)
    assert own.limited(0.5, 0.0, CURVATURE).largest_change == math.inf


def test_a_damping_against_noise_is_in_units_of_the_weights_too_and_bounds_no_update() -> None:
    own = OwnDamping(mean_square=0.01)
    assert own.limited(0.05, 0.1, CURVATURE).of(0.05) == pytest.approx(10.0)
    assert own.limited(0.2, 0.1, CURVATURE).of(0.2) == pytest.approx(20.0)
    most = own.limited(0.05, 100.0, CURVATURE)
    assert most.of(0.05) == pytest.approx(LARGEST_NOISE_DAMPING * 2.0)
    assert most.largest_change == math.inf


def test_a_failed_factorisation_leaves_the_damping_of_the_present_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    kfc = KFC(model, damping="auto", kl_clip="auto")
    with kfc.capture():
        loss = F.cross_entropy(model(torch.randn(16, 4)), torch.arange(16) % 3)
    kfc.update(loss)
    loss.backward()
    kfc.precondition(lr=0.1)
    layer = kfc.layers[""]
    before = layer.own_damping
    assert before.automatic is not None

    def failing(*_: object) -> Inverse:
        raise FactorisationError("no factorisation")

    monkeypatch.setattr(CholeskyInverse, "factorise", failing)
    with pytest.raises(FactorisationError):
        layer.refreshed(CholeskyInverse, 1e-3 * kfc.damping, 0.0)
    # A failure is not sent to other ranks, which review with the damping that they have.
    assert layer.own_damping == before
