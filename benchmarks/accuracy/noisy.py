"""Trainings whose loss the steps of one batch do not lower: noise, few examples in a batch, and games of two networks.

Inputs of 20 numbers and five classes, whose labels are noisy; 200 steps with a constant rate, KFC at its defaults and
AdamW at its usual rate. One column counts c as it is, while the loss does not fall
(:mod:`lightning_kfc.trust_region.region`). Run it by ``python -m benchmarks.accuracy.noisy``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from benchmarks.contest.optimizers import BatchLoss, KFCStepper, PlainStepper, Stepper
from benchmarks.paths import RESULTS
from lightning_kfc import KFC
from lightning_kfc.trust_region import region

EXAMPLES, INPUTS, CLASSES, LAST = 2048, 20, 5, 20

#: The loss of a batch, and the number that is reported.
Scored = tuple[Tensor, float]


class Case(nn.Module):
    """A network with its loss."""

    def scored(self, x: Tensor, y: Tensor) -> Scored:
        """The loss of a batch, and what is reported of it: by default the loss."""
        loss = self.loss(x, y)
        return loss, loss.item()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError


def net(outputs: int = CLASSES, hidden: int = 32) -> nn.Sequential:
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(INPUTS, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Classes(Case):
    """A cross entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The cross entropy."""
        return F.cross_entropy(self.net(x), y)


class HardGate(nn.Module):
    """Eight experts, each with the examples that a gate sends there; the last one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(INPUTS, 8), nn.ModuleList(net() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        """The output of the chosen expert, times its share."""
        shares = self.gate(x).softmax(-1)
        chosen, out = shares[:, :-1].argmax(-1), x.new_zeros(len(x), CLASSES)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * shares[rows, number, None])
        return out


class Policy(Case):
    """GRPO with one update of each batch (Shao et al. 2024, arXiv:2402.03300), whose loss is always 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def scored(self, x: Tensor, y: Tensor) -> Scored:
        """The loss of sampled classes, and the share of wrong ones."""
        policy = Categorical(logits=self.net(x))
        actions = policy.sample((8,))
        reward = (actions == y).float()
        advantage = (reward - reward.mean(0)) / (reward.std(0) + 1e-4)
        chosen = policy.log_prob(actions)
        ratio = (chosen - chosen.detach()).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return loss, 1 - reward.mean().item()


class Reversal(torch.autograd.Function):
    """The identity, with -0.3 times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the input."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Reverse the gradient."""
        return -0.3 * gradient


class Domains(Case):
    """Classes by features that hide from which of two domains an example is (Ganin et al. 2016, arXiv:1505.07818)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes, self.domains = net(32, 64), nn.Linear(32, CLASSES), net(2)
        self.domains[0] = nn.Linear(32, 32)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The cross entropies of classes, in one domain, and of domains."""
        features = self.features(torch.cat([x, x / 2 + 0.2])).relu()
        domains = torch.arange(2).repeat_interleave(len(x))
        return F.cross_entropy(self.classes(features[: len(x)]), y) + F.cross_entropy(
            self.domains(Reversal.apply(features)), domains
        )


class Mutual(Case):
    """Two networks, of which one also follows the logits of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = net(), net()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Both cross entropies, and the distance of the logits."""
        first, second = self.first(x), self.second(x)
        return F.cross_entropy(first, y) + F.cross_entropy(second, y) + F.mse_loss(first, second.detach())


class FewPositives(Case):
    """As a detector: a score and a box, divided by the number of positives, of which many batches have none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(5)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The losses of scores and of boxes."""
        out, positive = self.net(x), (y == 3) & (torch.rand(len(y)) < 0.1)
        count = max(1, int(positive.sum()))
        score = F.binary_cross_entropy_with_logits(out[:, 0], positive.float(), reduction="sum")
        return (score + F.smooth_l1_loss(out[positive][:, 1:], x[positive][:, :4], reduction="sum")) / count


def deep(depth: int) -> nn.Sequential:
    """A network of ReLU layers without normalisation or skips."""
    inner = [part for _ in range(depth) for part in (nn.ReLU(), nn.Linear(128, 128))]
    return nn.Sequential(nn.Linear(INPUTS, 128), *inner, nn.ReLU(), nn.Linear(128, CLASSES))


@dataclass(frozen=True)
class Situation:
    """A training.

    Attributes:
        make: Makes the network with its loss.
        batch: The examples of a batch.
        noise: The standard deviation of noise on the scores of the labels; that of the scores is about 0.8.
    """

    make: Callable[[], Case]
    batch: int = 64
    noise: float = 0.5


SITUATIONS = {
    "noisy labels, linear, batch 16": Situation(lambda: Classes(nn.Linear(INPUTS, CLASSES)), 16, 2.0),
    "noisy labels, linear, batch 64": Situation(lambda: Classes(nn.Linear(INPUTS, CLASSES)), 64, 2.0),
    "noisy labels, one hidden layer": Situation(lambda: Classes(net()), 64, 2.0),
    "experts behind a hard gate": Situation(lambda: Classes(HardGate())),
    "policy gradient, share of wrong classes": Situation(Policy),
    "reversed gradient": Situation(Domains),
    "logits of a second network": Situation(Mutual),
    "few positives": Situation(FewPositives, 32),
    "20 ReLU layers": Situation(lambda: Classes(deep(18)), 256),
    "30 ReLU layers": Situation(lambda: Classes(deep(28)), 256),
}


def train(situation: Situation, seed: int, *, with_kfc: bool, steps: int) -> float:
    """The mean of what is reported of the last steps."""
    generator = torch.Generator().manual_seed(100 + seed)
    inputs = torch.randn(EXAMPLES, INPUTS, generator=generator)
    scores = (inputs @ torch.randn(INPUTS, INPUTS, generator=generator) / 2).tanh()
    scores = scores @ torch.randn(INPUTS, CLASSES, generator=generator) / 4
    targets = (scores + situation.noise * torch.randn(EXAMPLES, CLASSES, generator=generator)).argmax(1)
    torch.manual_seed(seed)
    case, found = situation.make(), []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value, reported = case.scored(x, y)
        found.append(reported)
        return value

    if with_kfc:
        optimizer = torch.optim.SGD(case.parameters(), lr=0.5, momentum=0.5)
        stepper: Stepper = KFCStepper(KFC(case, damping="auto", kl_clip="auto"), optimizer)
    else:
        stepper = PlainStepper(torch.optim.AdamW(case.parameters(), lr=1e-3))
    shuffled = itertools.chain.from_iterable(
        torch.randperm(EXAMPLES, generator=generator).split(situation.batch) for _ in itertools.count()
    )
    for batch in itertools.islice(shuffled, steps):
        stepper.step(BatchLoss(nn.Identity(), loss, inputs[batch], targets[batch]))
    return mean(found[-LAST:])


def measured(situation: Situation, seeds: int, steps: int) -> list[list[float]]:
    """The results of all seeds: KFC, KFC with c as it is, and AdamW."""
    kfc = [train(situation, seed, with_kfc=True, steps=steps) for seed in range(seeds)]
    with mock.patch.multiple(region, STALLED_SLOPE=1.0, SMALLEST_STALLED_RADIUS=0.0):
        plain = [train(situation, seed, with_kfc=True, steps=steps) for seed in range(seeds)]
    adamw = [train(situation, seed, with_kfc=False, steps=steps) for seed in range(seeds)]
    return [kfc, plain, adamw]


def row(name: str, found: Sequence[Sequence[float]]) -> str:
    """A row of the table: the median and the worst seed of each."""
    return f"| {name} | " + " | ".join(f"{median(own):.3g} / {max(own):.3g}" for own in found) + " |"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = [
        f"Loss of the last {LAST} of {options.steps} steps; median / worst of {options.seeds} seeds.",
        "",
        "| training | KFC, defaults | c as it is | AdamW, 0.001 |",
        "|---|---|---|---|",
    ]
    for name, situation in SITUATIONS.items():
        lines.append(row(name, measured(situation, options.seeds, options.steps)))
        print(lines[-1], flush=True)
    (RESULTS / "noisy.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
