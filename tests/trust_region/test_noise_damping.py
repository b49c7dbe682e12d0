"""A layer with few rows in a step has more damping, where the curvature does not fall with the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.factors.damping import within_curvature
from lightning_kfc.trust_region.region import DAMPING

Loss = Callable[[Tensor, Tensor], Tensor]
INPUTS, ROWS = 60, 16


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean()


def labels(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y.argmax(1))


def bits(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, (y > 0).double())


def probabilities(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), (y > 0).double())


def both(z: Tensor, y: Tensor) -> Tensor:
    return labels(z, y) + F.mse_loss(z, y)


def with_a_penalty(z: Tensor, y: Tensor) -> Tensor:
    return labels(z, y) + 0.1 * z.square().mean()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z @ y.T, torch.arange(len(z)))


class Training:
    """A linear layer and its KFC, with new inverses at each step."""

    def __init__(self, loss: Loss, **options: object) -> None:
        torch.manual_seed(0)
        self.model, self.loss = nn.Linear(INPUTS, 3).double(), loss
        self.kfc = KFC(self.model, **{"damping": "auto", "kl_clip": "auto", "rule": "natural", **options})
        self.losses: list[float] = []

    def step(self) -> None:
        step = len(self.losses)
        generator = torch.Generator().manual_seed(0)
        # Falling losses, whatever the training does. Those that may become negative count as half of the last at least.
        y = 0.75**step * torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
        x = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.75 if step else 1).grad = None
        with self.kfc.capture():
            loss = self.loss(self.model(x), y)
        self.kfc.update(loss)
        loss.backward()
        self.kfc.precondition(lr=1e-3)
        self.kfc.reviewer.cancel()
        self.losses.append(float(loss.detach()))

    @property
    def least(self) -> tuple[float, float]:
        """The damping as a share of the present loss, and the least one against noise."""
        layer = self.kfc.layers[""]
        unit = DAMPING / layer.own_damping.mean_square
        first, last = self.losses[0], self.losses[-1]
        return unit * last, unit * (INPUTS + 1) / ROWS * math.sqrt(first * last)


@pytest.mark.parametrize("options", [{}, {"fisher": "exact"}, {"fisher": "empirical"}, {"inverse": "eigh"}])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss, by_hand])
def test_losses_of_residuals_have_a_damping_against_noise(loss: Loss, options: dict[str, object]) -> None:
    training = Training(loss, factor_every_n_steps=1, inverse_every_n_steps=1, **options)
    for _ in range(3):
        training.step()
        layer = training.kfc.layers[""]
        share, against_noise = training.least
        expected = within_curvature(share, against_noise, layer.curvature())
        assert layer.own_damping.automatic == pytest.approx(expected, rel=1e-6)
    assert against_noise > 3 * share


@pytest.mark.parametrize("loss", [labels, bits, probabilities])
def test_losses_of_labels_have_none(loss: Loss) -> None:
    training = Training(loss, factor_every_n_steps=1, inverse_every_n_steps=1)
    for _ in range(2):
        training.step()
        layer = training.kfc.layers[""]
        share, against_noise = training.least
        assert layer.own_damping.automatic == pytest.approx(within_curvature(share, 0.0, layer.curvature()), rel=1e-9)
        assert against_noise > share


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (labels, True),
        (bits, True),
        (probabilities, True),
        (both, False),
        (with_a_penalty, False),
        (by_hand, False),
        (contrastive, False),
    ],
)
def test_curvature_falls_with_the_loss_where_all_its_terms_are_of_labels(loss: Loss, expected: bool) -> None:
    training = Training(loss)
    training.step()
    assert training.kfc.state_dict()["saturates"] is expected


@pytest.mark.parametrize("residuals_first", [True, False])
def test_every_loss_of_a_step_counts(residuals_first: bool) -> None:
    losses = [F.mse_loss, labels] if residuals_first else [labels, F.mse_loss]
    model = nn.Linear(4, 3).double()
    kfc = KFC(model, damping="auto", kl_clip="auto")
    x, y = torch.randn(2, 8, 4, dtype=torch.float64)
    for loss in losses:
        with kfc.capture():
            value = loss(model(x), y[:, :3])
        kfc.update(value, accumulate=True)
        value.backward()
    kfc.precondition(lr=0.1)
    assert kfc.state_dict()["saturates"] is False


@pytest.mark.parametrize("loss", [labels, F.mse_loss])
def test_a_state_keeps_what_the_damping_follows(loss: Loss) -> None:
    training = Training(loss)
    training.step()
    again = Training(loss)
    again.kfc.load_state_dict(training.kfc.state_dict())
    assert again.kfc.state_dict()["saturates"] == training.kfc.state_dict()["saturates"]
    assert again.kfc.reviewer.region.first_loss == training.losses[0]


def test_a_fixed_damping_is_the_user_s_alone() -> None:
    training = Training(F.mse_loss, damping=1e-7)
    training.step()
    assert training.kfc.layers[""].damping(1e-7) == 1e-7
