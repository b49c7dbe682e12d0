"""Whole models with losses of their own, 30 steps each with the defaults: the loss falls, no parameter is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
from tests.engine.test_zoo import Task
from tests.helpers.lightning_nets import QUIET, trainer

pytestmark = [*QUIET, pytest.mark.slow]

STEPS = 30


class VariationalAutoencoder(nn.Module):
    """Reconstruction and divergence of a sampled code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(code), (x > 0).float(), reduction="sum")
        return (reconstruction + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()) / len(x)


class ActorCritic(nn.Module):
    """A policy by the log-probability of its actions times their advantage, and a value head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 12), nn.Tanh())
        self.policy, self.value = nn.Linear(12, 3), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        value, returns = self.value(features).squeeze(-1), x[:, :4].sum(-1)
        actions = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        log_probabilities = torch.distributions.Categorical(logits=self.policy(features)).log_prob(actions)
        advantages = (returns - value.detach()).abs()
        return -(log_probabilities * advantages).mean() + 0.5 * F.mse_loss(value, returns)


class TwoTowers(nn.Module):
    """Two encoders whose matching outputs are to be alike, with a trained temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.normalize(self.left(x[:, :8]), dim=-1), F.normalize(self.right(x[:, 4:12]), dim=-1)
        scores, pairs = self.temperature.exp() * left @ right.T, torch.arange(len(x))
        return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


class Siamese(nn.Module):
    """One encoder for both inputs of a pair, and a margin on their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        distances = F.pairwise_distance(self.encoder(x[:, :8]), self.encoder(x[:, 8:]))
        alike = (x[:, 0] * x[:, 8] > 0).float()
        return (alike * distances.square() + (1 - alike) * (1.5 - distances).relu().square()).mean()


class Detector(nn.Module):
    """Scores and boxes at two scales, as lists: a focal loss of the scores, a smooth one of the boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)])
        self.scores, self.boxes = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features, scores, boxes = x.reshape(-1, 1, 4, 4), [], []
        for stage in self.stages:
            features = stage(features).relu()
            scores.append(self.scores(features).flatten(2))
            boxes.append(self.boxes(features).flatten(2))
        found = torch.cat(scores, -1)
        targets = (x[:, :1, None] > 0).float().expand_as(found)
        plain = F.binary_cross_entropy_with_logits(found, targets, reduction="none")
        focal = ((1 - (-plain).exp()).square() * plain).mean()
        return focal + F.smooth_l1_loss(torch.cat(boxes, -1), x[:, :4, None].expand(-1, -1, found.shape[-1]))


class Denoiser(nn.Module):
    """A U-Net with attention at its bottom that predicts noise, told the time by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.down, self.bottom = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.attention = nn.GroupNorm(2, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        images, times = x.reshape(-1, 1, 4, 4).repeat(1, 1, 2, 2), torch.rand(len(x), 1)
        noise = torch.randn_like(images)
        mixed = (1 - times)[..., None, None] * images + times[..., None, None] * noise
        top = F.silu(self.down(mixed) + self.time(times)[..., None, None])
        low = self.norm(self.bottom(top))
        tokens = low.flatten(2).mT
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(low.shape)
        return F.mse_loss(self.out(torch.cat([top, self.up(low + attended)], 1)), noise)


class Transcriber(nn.Module):
    """A recurrent network with the loss of an unaligned sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.out = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        log_probabilities = self.out(self.recurrent(x.reshape(-1, 8, 2))[0]).log_softmax(-1)
        targets = 1 + (x[:, :3] > 0).long()
        lengths = (torch.full((len(x),), length) for length in (8, 3))
        return F.ctc_loss(log_probabilities.transpose(0, 1), targets, *lengths)


MODELS = (VariationalAutoencoder, ActorCritic, TwoTowers, Siamese, Detector, Denoiser, Transcriber)


@pytest.mark.parametrize("make", MODELS)
def test_a_whole_model_trains_with_the_defaults_and_is_accounted_for(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    task, callback = Task(make(), lambda model, batch: model(batch), lr=0.5), KFCCallback()
    # Four directions, which the code of an autoencoder can hold in part.
    batch = torch.randn(64, 4) @ torch.randn(4, 16) / 2
    trainer(callback, max_steps=STEPS).fit(task, DataLoader([batch] * STEPS, batch_size=None))
    start, end = sum(task.losses[:3]) / 3, sum(task.losses[-3:]) / 3
    coverage = callback.kfc.coverage()
    treatments: Counter[str] = Counter()
    for row in coverage:
        treatments[row.treatment] += row.numel
    print(f"{make.__name__}: loss {start:.3g} to {end:.3g}, {dict(treatments)}, {callback.kfc.events}")
    assert end < 0.9 * start
    # No parameter has its plain gradient.
    assert set(treatments) <= {"kfc", "block", "diagonal"}
    assert sum(treatments.values()) == sum(p.numel() for p in task.parameters())
    assert callback.kfc.reviewer.active
