"""The cost of a review: ``python -m benchmarks.cost.review_cost``.

For each network, the CPU time on one thread of a forward with its loss; of a recorded forward; and of the replay of its
loss with other weights. The three take turns; each number is the median of the ratios to the forward of the round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest.networks import resnet20
from benchmarks.paths import RESULTS
from lightning_kfc.trust_region.replay import RecordedLoss
from lightning_kfc.trust_region.tape import Tape

LossOf = Callable[[], Tensor]


class Gated(nn.Module):
    """A GRU over symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.recurrent, self.head = (
            nn.Embedding(64, 64),
            nn.GRU(64, 128, batch_first=True),
            nn.Linear(128, 64),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits for each position."""
        logits: Tensor = self.head(self.recurrent(self.embedding(x))[0])
        return logits


def _images(model: nn.Module, batch: int, side: int, channels: int) -> LossOf:
    x, y = torch.randn(batch, channels, side, side), torch.randint(10, (batch,))
    return lambda: F.cross_entropy(model(x), y)


def _conv_net() -> LossOf:
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 10)),
    )
    return _images(model, 128, 28, 1)


def _depthwise_net() -> LossOf:
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(4):
        blocks += [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
        blocks += [nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Dropout(0.1)]
    return _images(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)), 128, 16, 3)


def _transformer() -> LossOf:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(64, 32, 64)
    return lambda: F.mse_loss(model(x), x)


def _recurrent() -> LossOf:
    model, x = Gated(), torch.randint(64, (64, 32))
    return lambda: F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def _dense() -> LossOf:
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 784))
    x = torch.rand(512, 784)
    return lambda: F.binary_cross_entropy_with_logits(model(x), x)


NETWORKS: dict[str, Callable[[], LossOf]] = {
    "conv net, batch 128": _conv_net,
    "ResNet-20, batch 32": lambda: _images(resnet20(), 32, 32, 3),
    "depthwise net, batch norm, dropout, batch 128": _depthwise_net,
    "dense net, batch 512": _dense,
    "transformer, batch 64": _transformer,
    "GRU, batch 64": _recurrent,
}


def _timed(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def _recorded(loss_of: LossOf) -> tuple[Tensor, RecordedLoss]:
    tape = Tape()
    with tape:
        loss = loss_of()
    tape.finish()
    found = tape.locate(loss)
    assert found is not None, tape.refusal
    return loss, found


def measure(loss_of: LossOf, rounds: int) -> dict[str, float]:
    """Medians over rounds of a recorded forward and of a replay, plain forward = 1."""
    _, found = _recorded(loss_of)
    recorded, replayed = [], []
    for _ in range(rounds):
        forward = _timed(loss_of)
        recorded.append(_timed(lambda: _recorded(loss_of)) / forward)
        replayed.append(_timed(lambda: found.replay({}, with_collectives=False)) / forward)
    return {"recorded": median(recorded), "replay": median(replayed)}


def table(found: dict[str, dict[str, float]]) -> str:
    """The results as Markdown."""
    rows = [f"| {name} | {row['recorded']:.2f} | {row['replay']:.2f} |" for name, row in found.items()]
    return "\n".join(["| forward and loss = 1 | recorded | replay |", "|---|---|---|", *rows]) + "\n"


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {name: measure(make(), options.rounds) for name, make in NETWORKS.items()}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "review_cost.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.results / "review_cost.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
