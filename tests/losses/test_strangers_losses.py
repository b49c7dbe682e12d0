"""Losses as people write them: each trains with one line that says where its curvature comes from, and no warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets import classes, data, double, engine, train_step

N, K = 12, 4
TARGET, HOT = classes(N, count=K), F.one_hot(classes(N, count=K), K).double()
Y = data(N, K, seed=3)
SIGNS = 2 * HOT - 1


def dice(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return 1 - ((2 * (p * HOT).sum(1) + 1) / (p.sum(1) + HOT.sum(1) + 1)).mean()


def focal(z: Tensor) -> Tensor:
    ce = F.cross_entropy(z, TARGET, reduction="none")
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


def contrastive(z: Tensor) -> Tensor:
    a = F.normalize(z, dim=1)
    similarity = (a @ a.T / 0.5).masked_fill(torch.eye(N, dtype=torch.bool), -1e9)
    return (similarity.logsumexp(1) - similarity.roll(1, 1).diagonal()).mean()


def wing(z: Tensor) -> Tensor:
    r = (z - Y).abs()
    return torch.where(r < 1, 1 * torch.log1p(r / 0.5), r - 1 + torch.log1p(torch.tensor(2.0).double())).mean()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "dice": dice,
    "focal": focal,
    "contrastive by hand": contrastive,
    "wing": wing,
    "log-cosh": lambda z: (z - Y).cosh().log().mean(),
    "squares by hand": lambda z: ((z - Y) ** 2).mean(),
    "cross entropy by hand": lambda z: -(HOT * z.log_softmax(1)).sum(1).mean(),
    "hinge": lambda z: (1 - SIGNS * z).clamp_min(0).mean(),
    "charbonnier": lambda z: ((z - Y).square() + 1e-3).sqrt().mean(),
    "quantile": lambda z: torch.maximum(0.9 * (Y - z), -0.1 * (Y - z)).mean(),
    "triplet": lambda z: F.triplet_margin_loss(z, Y, Y.roll(1, 0)),
    "cosine embedding": lambda z: F.cosine_embedding_loss(z, Y, torch.ones(N).double()),
    "margin ranking": lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], torch.ones(N).double(), margin=0.5),
    "multi-margin": lambda z: F.multi_margin_loss(z, TARGET),
    "hinge embedding": lambda z: F.hinge_embedding_loss(z.square(), SIGNS),
    "dice and cross entropy": lambda z: dice(z) + F.binary_cross_entropy_with_logits(z, HOT),
    "squares and a norm": lambda z: F.mse_loss(z, Y) + 0.01 * z.norm(),
    "smoothed labels": lambda z: F.cross_entropy(z, TARGET, label_smoothing=0.1),
    "distillation": lambda z: F.kl_div(z.log_softmax(1), Y.softmax(1), reduction="batchmean"),
    "generalised cross entropy": lambda z: ((1 - z.softmax(1).gather(1, TARGET[:, None]) ** 0.7) / 0.7).mean(),
    "tversky": lambda z: 1 - (z.sigmoid() * HOT).sum() / ((z.sigmoid() * HOT).sum() + (z.sigmoid() - HOT).abs().sum()),
    "ctc": lambda z: F.ctc_loss(
        z.log_softmax(1).reshape(4, 3, K), torch.ones(3, 1, dtype=torch.long), (4, 4, 4), (1, 1, 1)
    ),
    "correlation": lambda z: 1 - F.cosine_similarity(z - z.mean(0), Y - Y.mean(0), dim=0).mean(),
    "log_prob": lambda z: -torch.distributions.Normal(z[:, :2], z[:, 2:].exp()).log_prob(Y[:, :2]).mean(),
}


@pytest.mark.parametrize("case", LOSSES)
def test_it_trains_with_one_line_on_its_curvature(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_kfc")
    model, x = double(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, K)), data(N, 5)
    kfc, optimizer = engine(model, fisher="mc", kl_clip=0.003), torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [float(train_step(kfc, optimizer, lambda: LOSSES[case](model(x)))) for _ in range(15)]
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert losses[-1] < losses[0]
    assert len([r for r in caplog.records if "curvature from" in r.getMessage()]) == 1
    assert {name for name, count in kfc.events.state_dict().items() if count} <= {"unrecognised_losses"}
    assert all(layer.inverse is not None for layer in kfc.layers.values())
