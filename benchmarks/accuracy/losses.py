"""Losses that people use, each with a small network: KFC at its defaults, and AdamW at its usual rate.

Two epochs of 40 batches of 64 digits, with a constant rate. The network has one hidden layer, or what the name of the
case says. *While training* is the mean of the last five batches' losses; *afterwards* that of all batches by the
weights that ``fit`` leaves, which for KFC are averaged. One column has no damping against noise
(:mod:`lightning_kfc.trust_region.region`); another one has a fixed damping, as a user may set it. The last one is how
soon KFC has AdamW's last loss, as a mean of five batches: its steps, of AdamW's 80, and its share of AdamW's time. Run
it by ``python -m benchmarks.accuracy.losses``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from unittest import mock

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contest.data import mnist
from benchmarks.devices import quiet_trainer
from benchmarks.paths import RESULTS
from lightning_kfc import KFCCallback
from lightning_kfc.factors import damping

EXAMPLES, BATCH, EPOCHS = 2560, 64, 2
#: The batches whose mean is the loss while training.
LAST = 5
#: The fixed damping.
FIXED = 0.1
#: A loss of the network's outputs, the pixels and the classes.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def amount(x: Tensor) -> Tensor:
    """The regression target: the ink in the left half."""
    return 10 * x.view(-1, 28, 28)[..., :14].mean((1, 2))


def views(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of two noisy views, of length 1."""
    first, second = (F.normalize(network(x + 0.2 * torch.randn_like(x)), dim=1) for _ in range(2))
    return first, second


def focal(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The focal loss of Lin et al. 2017, arXiv:1708.02002."""
    each = F.cross_entropy(network(x), y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def dice(logits: Tensor, x: Tensor) -> Tensor:
    """The soft Dice loss of each picture."""
    p, t = logits.sigmoid(), (x > 0.5).float()
    return 1 - ((2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


def pairs(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE."""
    first, second = views(network, x)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(x)))


def contrastive(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """NT-Xent by hand."""
    codes = torch.cat(views(network, x))
    similar = (codes @ codes.T / 0.1).masked_fill(torch.eye(len(codes), dtype=torch.bool), -1e9)
    right = torch.cat([similar.diagonal(len(x)), similar.diagonal(-len(x))])
    return (similar.logsumexp(1) - right).mean()


def triplets(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A picture, a noisy view of it, and another picture."""
    codes = network(x)
    return F.triplet_margin_loss(codes, network(x + 0.1 * torch.randn_like(x)), codes.roll(1, 0))


def cosine(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Neighbours in the batch are alike if their classes are."""
    codes = network(x)
    return F.cosine_embedding_loss(codes, codes.roll(1, 0), torch.where(y == y.roll(1), 1, -1))


def distilled(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A fixed linear teacher."""
    teacher = x @ torch.randn(784, 10, generator=torch.Generator().manual_seed(0)) / 28
    return 4 * F.kl_div((network(x) / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")


def probabilities(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``nll_loss`` of the logarithm of a softmax."""
    return F.nll_loss((network(x).softmax(1) + 1e-8).log(), y)


def by_hand(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A cross entropy by hand."""
    return -(F.one_hot(y, 10) * network(x).log_softmax(1)).sum(1).mean()


def gaussian(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean and variance."""
    mean, raw = network(x).unbind(1)
    return F.gaussian_nll_loss(mean, amount(x), F.softplus(raw) + 1e-3)


def density(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same by a distribution."""
    mean, raw = network(x).unbind(1)
    return -torch.distributions.Normal(mean, F.softplus(raw) + 1e-2).log_prob(amount(x)).mean()


def residual(of: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A regression loss."""
    return lambda network, x, y: of(network(x)[:, 0], amount(x))


def bits(of: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss of a picture of black and white pixels."""
    return lambda network, x, y: of(network(x), (x > 0.5).float())


def hidden_layers(number: int, outputs: int) -> nn.Sequential:
    """Hidden layers of 64 units with ReLU."""
    widths = [784, *[64] * number]
    layers = [part for d_in, d_out in itertools.pairwise(widths) for part in (nn.Linear(d_in, d_out), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, outputs))


def normalised(outputs: int) -> nn.Sequential:
    """Two hidden layers with batch norm."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, outputs),
    )  # fmt: skip


def convolutions(outputs: int) -> nn.Sequential:
    """Two strided convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, outputs),
    )  # fmt: skip


#: By name: the number of outputs, and the loss.
LOSSES: dict[str, tuple[int, Loss]] = {
    "cross entropy": (10, lambda n, x, y: F.cross_entropy(n(x), y)),
    "cross entropy with smoothed labels": (10, lambda n, x, y: F.cross_entropy(n(x), y, label_smoothing=0.1)),
    "cross entropy by hand": (10, by_hand),
    "log of probabilities": (10, probabilities),
    "focal": (10, focal),
    "multi-margin": (10, lambda n, x, y: F.multi_margin_loss(n(x), y)),
    "distillation": (10, distilled),
    "distillation and labels": (10, lambda n, x, y: (distilled(n, x, y) + F.cross_entropy(n(x), y)) / 2),
    "Dice": (784, lambda n, x, y: dice(n(x), x)),
    "Dice and binary cross entropy": (784, bits(lambda z, t: dice(z, t) + F.binary_cross_entropy_with_logits(z, t))),
    "probabilities of bits": (784, bits(lambda z, t: F.binary_cross_entropy(z.sigmoid(), t))),
    "InfoNCE": (32, pairs),
    "NT-Xent by hand": (32, contrastive),
    "triplet margin": (32, triplets),
    "cosine embedding": (32, cosine),
    "squares": (1, residual(F.mse_loss)),
    "squares by hand": (1, residual(lambda z, t: (z - t).square().mean())),
    "log-cosh": (1, residual(lambda z, t: (z - t).cosh().log().mean())),
    "Huber": (1, residual(F.huber_loss)),
    "smooth L1": (1, residual(lambda z, t: F.smooth_l1_loss(z, t, beta=0.5))),
    "L1": (1, residual(F.l1_loss)),
    "Poisson": (1, residual(lambda z, t: F.poisson_nll_loss(z, t.round()))),
    "Gaussian with a variance": (2, gaussian),
    "`Normal.log_prob`": (2, density),
    "squares, all pixels": (784, lambda n, x, y: F.mse_loss(n(x), x)),
    "squares, five hidden layers": (1, residual(F.mse_loss)),
    "L1, five hidden layers": (1, residual(F.l1_loss)),
    "squares, batch norm": (1, residual(F.mse_loss)),
    "squares, convolutions": (1, residual(F.mse_loss)),
    "squares of digits, convolutions": (1, lambda n, x, y: F.mse_loss(n(x)[:, 0], y.float())),
}
#: The networks by the last part of a case's name; others have one hidden layer.
NETWORKS: dict[str, Callable[[int], nn.Sequential]] = {
    "five hidden layers": functools.partial(hidden_layers, 5),
    "batch norm": normalised,
    "convolutions": convolutions,
}


class Classes(LightningModule):
    """A network and its loss.

    Args:
        name: The case.
        with_kfc: Whether the optimizer is the one for KFC; else AdamW.
    """

    def __init__(self, name: str, *, with_kfc: bool) -> None:
        super().__init__()
        outputs, self._loss = LOSSES[name]
        self._with_kfc = with_kfc
        self.network = NETWORKS.get(name.split(", ")[-1], functools.partial(hidden_layers, 1))(outputs)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        return self._loss(self.network, x, y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Note the loss and the time."""
        self.seconds.append(time.process_time())
        loss = self.loss(*batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Optimizer:
        """SGD as recommended, or AdamW at its usual rate."""
        if self._with_kfc:
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Fit:
    """A training.

    Attributes:
        losses: The mean of five batches' losses, from the fifth step on.
        seconds: The time from the first step to each of these.
        afterwards: The loss of all batches by the weights that ``fit`` leaves.
    """

    losses: Sequence[float]
    seconds: Sequence[float]
    afterwards: float

    def reach(self, loss: float) -> tuple[float, float]:
        """The steps and seconds to a loss; infinity if it was not reached."""
        found = ((LAST + i, self.seconds[i]) for i, own in enumerate(self.losses) if own <= loss)
        return next(found, (math.inf, math.inf))


def fit(name: str, seed: int, *callbacks: KFCCallback) -> Fit:
    """A training with KFC or AdamW."""
    data = mnist()
    x, y = data.train_inputs[:EXAMPLES].flatten(1), data.train_targets[:EXAMPLES]
    torch.manual_seed(seed)
    module = Classes(name, with_kfc=bool(callbacks))
    trainer = quiet_trainer("cpu", max_epochs=EPOCHS, callbacks=[*callbacks])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True))
    # The same noise for all.
    torch.manual_seed(99)
    with torch.no_grad():
        afterwards = mean(float(module.loss(a, b)) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True))
    ends = range(LAST, len(module.losses) + 1)
    means, seconds = [mean(module.losses[end - LAST : end]) for end in ends], module.seconds
    return Fit(means, [seconds[end - 1] - seconds[0] for end in ends], afterwards)


def measured(name: str, seeds: int) -> list[list[Fit]]:
    """All seeds: KFC, without damping against noise, with a fixed damping, and AdamW."""
    found: list[list[Fit]] = []
    for seed in range(seeds):
        kfc, adamw = fit(name, seed, KFCCallback()), fit(name, seed)
        with mock.patch.object(damping, "LARGEST_NOISE_DAMPING", 0.0):
            plain = fit(name, seed, KFCCallback())
        found.append([kfc, plain, fit(name, seed, KFCCallback(damping=FIXED)), adamw])
    return [list(runs) for runs in zip(*found, strict=True)]


def sooner(kfc: Sequence[Fit], adamw: Sequence[Fit]) -> str:
    """The median of the steps of KFC to AdamW's median last loss, and its share of AdamW's time."""
    goal = median(run.losses[-1] for run in adamw)
    steps, seconds = (median(numbers) for numbers in zip(*(run.reach(goal) for run in kfc), strict=True))
    if not math.isfinite(steps):
        return "**never**"
    share = seconds / median(run.seconds[-1] for run in adamw)
    return f"{steps:g} / {share:.2f}" if share <= 1 else f"{steps:g} / **{share:.2f}**"


def row(name: str, found: Sequence[Sequence[Fit]]) -> str:
    """A row of the table."""
    columns = [(median(run.losses[-1] for run in runs), median(run.afterwards for run in runs)) for runs in found]
    cells = [
        " / ".join(f"**{v:.3g}**" if v > other else f"{v:.3g}" for v, other in zip(pair, columns[-1], strict=True))
        for pair in columns
    ]
    return f"| {name} | " + " | ".join([*cells, sooner(found[0], found[-1])]) + " |"


def main() -> None:
    """Measure, and write the table after each loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = [
        f"Loss while training / afterwards; medians of {options.seeds} seeds; bold: above AdamW's.",
        "",
        f"| loss | KFC, defaults | without damping against noise | damping={FIXED:g} | AdamW, 0.001 "
        "| AdamW's last loss: steps of 80 / time |",
        "|---|---|---|---|---|---|",
    ]
    for name in LOSSES:
        lines.append(row(name, measured(name, options.seeds)))
        (RESULTS / "losses.md").write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
