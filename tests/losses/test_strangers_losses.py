"""Common losses: each trains with one line that names the sources of its curvature, and no warning."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
from tests.helpers.harness import fit
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


def focal_of_bits(z: Tensor) -> Tensor:
    p, ce = z.sigmoid(), F.binary_cross_entropy_with_logits(z, HOT, reduction="none")
    return (ce * (1 - p * HOT - (1 - p) * (1 - HOT)) ** 2).mean()


def pairs(z: Tensor) -> Tensor:
    a, b = F.normalize(z[: N // 2], dim=1), F.normalize(z[N // 2 :], dim=1)
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(N // 2))


def autoencoder(z: Tensor) -> Tensor:
    mean, log_variance = z.chunk(2, 1)
    kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
    drawn = (
        mean + torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).double() * (log_variance / 2).exp()
    )
    return F.binary_cross_entropy_with_logits(drawn, HOT[:, :2], reduction="none").sum(1).mean() + kl


def distillation_and_labels(z: Tensor) -> Tensor:
    soft = F.kl_div((z / 2).log_softmax(1), (Y / 2).softmax(1), reduction="batchmean") * 4
    return 0.5 * soft + 0.5 * F.cross_entropy(z, TARGET)


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
    "cross entropy": lambda z: F.cross_entropy(z, TARGET),
    "focal of yes/no outputs": focal_of_bits,
    "pairs in a batch": pairs,
    "variational autoencoder": autoencoder,
    "distillation and labels": distillation_and_labels,
    "huber": lambda z: F.huber_loss(z, Y),
    "smooth l1": lambda z: F.smooth_l1_loss(z, Y),
    "l1": lambda z: F.l1_loss(z, Y),
    "gaussian with a variance": lambda z: F.gaussian_nll_loss(z[:, :2], Y[:, :2], F.softplus(z[:, 2:]) + 1e-3),
    "yes/no probabilities": lambda z: F.binary_cross_entropy(z.sigmoid(), HOT),
    "log of probabilities": lambda z: F.nll_loss((z.softmax(1) + 1e-8).log(), TARGET),
    "counts": lambda z: F.poisson_nll_loss(z, Y.abs().round()),
    "log_prob": lambda z: -torch.distributions.Normal(z[:, :2], z[:, 2:].exp()).log_prob(Y[:, :2]).mean(),
}


@pytest.mark.parametrize("case", LOSSES)
def test_it_trains_with_one_line_on_its_curvature(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_kfc")
    model, x = double(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, K)), data(N, 5)
    kfc, optimizer = engine(model, fisher="mc", kl_clip=0.003), torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [float(train_step(kfc, optimizer, lambda: LOSSES[case](model(x)))) for _ in range(8)]
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert losses[-1] < losses[0]
    assert len([r for r in caplog.records if "curvature from" in r.getMessage()]) == 1
    assert {name for name, count in kfc.events.state_dict().items() if count} <= {"unrecognised_losses"}
    assert all(layer.inverse is not None for layer in kfc.layers.values())


class Task(pl.LightningModule):
    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = double(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, K)), loss
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.loss(self.net(batch))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(many workers|number of training batches|treespec).*")
# Hinges come to be zero.
@pytest.mark.filterwarnings("ignore:.*no statistics are taken of this loss")
@pytest.mark.parametrize("case", LOSSES)
def test_it_trains_under_a_trainer_with_the_defaults(case: str) -> None:
    task, callback = Task(LOSSES[case]), KFCCallback()
    fit(task, kfc=callback, data=DataLoader([data(N, 5)] * 40, batch_size=None), max_steps=40)
    assert all(map(math.isfinite, task.losses))
    assert min(task.losses[-5:]) < task.losses[0]
    harmless = {"unrecognised_losses", "undone_steps", "shortened_steps", "losses_without_gradient"}
    assert {name for name, count in callback.kfc.events.state_dict().items() if count} <= harmless
    assert all(layer.inverse is not None for layer in callback.kfc.layers.values())
