"""Losses in evaluation mode with batch norm: ``python -m benchmarks.accuracy.evaluation_mode``.

Networks of five kinds with batch norm train with :class:`~lightning_kfc.KFCCallback` at its defaults. After each of the
first 20 steps, and every fifth one, the training loss of the same examples is taken in evaluation mode: with the
trained weights, with the averaged weights of a validation, and with each of them and new statistics of batch norm, from
a pass over the training data. A fifth loss is that of averaged weights with the training's running statistics. Nothing
is chosen by these numbers. A run of one network with one seed is a piece; after an interruption, the command continues
with the missing pieces.

Written to ``results/evaluation_mode.{json,md}``.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from benchmarks.away.tasks import AWAY
from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.devices import quiet_trainer
from lightning_kfc import KFCCallback

NAME = "evaluation_mode"
SEEDS = (0, 1, 2)
#: Losses are measured after each of the first steps, then with this period.
FIRST, EVERY = 20, 5
STEPS = 120
#: The steps with a row of their own; the row after them has the worst of all but the first.
REPORTED = (1, 5, 20, 60, 120)
#: The numbers of examples for the loss, and for new statistics.
MEASURED, PASSED = 512, 2048
NETWORKS: dict[str, Callable[[], Task]] = {
    "depthwise-separable net": lambda: AWAY["separable"],
    "ResNet-20, half as wide": lambda: TASKS["resnet"],
    "convolutions down and up": lambda: AWAY["segmentation"],
    "DenseNet of MONAI": lambda: replace(TASKS["resnet"], make_model=densely_connected),
    "one-dimensional convolutions": lambda: replace(AWAY["signals"], make_model=convolutions_of_signals),
}


def densely_connected() -> nn.Module:
    """A small DenseNet."""
    networks = importlib.import_module("monai.networks.nets")
    made: nn.Module = networks.DenseNet(
        spatial_dims=2, in_channels=3, out_channels=10, init_features=8, growth_rate=6, block_config=(3, 3)
    )
    return made


def convolutions_of_signals(width: int = 24) -> nn.Sequential:
    """Convolutions over time with batch norm, and a linear layer with it."""
    layers = [nn.Sequential(nn.Conv1d(c, width, 5, stride=2), nn.BatchNorm1d(width), nn.ReLU()) for c in (1, width)]
    head = (nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(4 * width, 32), nn.BatchNorm1d(32), nn.ReLU())
    return nn.Sequential(*layers, *head, nn.Linear(32, 8))


class _Batches(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, task: Task, seed: int) -> None:
        self._make = functools.partial(task.batches, seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._make()


def measured_after(step: int) -> bool:
    """Whether losses are measured after this step."""
    return step <= FIRST or step % EVERY == 0


class Measured(pl.LightningModule):
    """A network of a task, which measures losses at the begin of a validation.

    Args:
        task: The task; at most 2048 of its examples are measured.

    Attributes:
        losses: By step, the losses by kind.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.net = task.make_model()
        self.losses: dict[int, dict[str, float]] = {}
        # In a tuple, so that the network is no part of this module.
        self._of_training: tuple[nn.Module, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.task.loss(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the training's network, if a validation follows."""
        if measured_after(self.global_step):
            self._of_training = (copy.deepcopy(self.net),)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: :meth:`on_validation_epoch_start` measures."""

    def on_validation_epoch_start(self) -> None:
        """Take all losses of the module's present weights, and of the training's."""
        if self.trainer.sanity_checking or not measured_after(self.global_step):
            return
        split = self.task.data()
        inputs, targets = split.train_inputs[:PASSED], split.train_targets[:PASSED]

        def loss(net: nn.Module) -> float:
            return float(self.task.loss(net.eval()(inputs[:MEASURED]), targets[:MEASURED]))

        averaged, (training,) = copy.deepcopy(self.net), self._of_training
        beside = copy.deepcopy(averaged)
        for own, other in zip(beside.buffers(), training.buffers(), strict=True):
            own.copy_(other)
        self.losses[self.global_step] = {
            "training": loss(training),
            "training, fresh": loss(with_fresh_statistics(training, inputs)),
            "averaged": loss(averaged),
            "averaged, statistics of training": loss(beside),
            "averaged, fresh": loss(with_fresh_statistics(averaged, inputs)),
        }

    def configure_optimizers(self) -> Any:
        """The recommended optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


def with_fresh_statistics(net: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy whose batch norm has the means of a pass without dropout, in batches of 512."""
    net = copy.deepcopy(net).train()
    for layer in net.modules():
        if isinstance(layer, _BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None
        elif isinstance(layer, nn.Dropout):
            layer.eval()
    for batch in inputs.split(512):
        net(batch)
    return net


def measure(task: Task, seed: int, steps: int = STEPS) -> dict[int, dict[str, float]]:
    """The losses of one run, by step and kind."""
    torch.manual_seed(seed)
    module = Measured(task)
    trainer = quiet_trainer(
        "cpu", max_steps=steps, val_check_interval=1, inference_mode=False, callbacks=[KFCCallback()]
    )
    nothing = DataLoader(TensorDataset(torch.zeros(1)))
    trainer.fit(module, DataLoader(_Batches(task, seed), batch_size=None), nothing)
    return module.losses


def table(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The table of all runs: medians of the losses, the misses of the seeds, and the largest of all steps and seeds."""
    lines = [
        "| network | step | weights that train | fresh | averaged weights, as validated | fresh "
        "| validated beyond fresh, by seed | with the statistics of training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, runs in results.items():
        for step in map(str, REPORTED):
            rows = [run[step] for _, run in sorted(runs.items())]
            middle = {kind: _median([row[kind] for row in rows]) for kind in rows[0]}
            misses = [_percent(row["averaged"], row["averaged, fresh"]) for row in rows]
            lagging = [_percent(row["averaged, statistics of training"], row["averaged, fresh"]) for row in rows]
            cells = [network, step, *(f"{middle[kind]:.3f}" for kind in ("training", "training, fresh", "averaged"))]
            cells += [f"{middle['averaged, fresh']:.3f}", ", ".join(misses), ", ".join(lagging)]
            lines.append(f"| {' | '.join(cells)} |")
        # After the first step alone the statistics are those of other weights.
        every = [row for run in runs.values() for step, row in run.items() if step != "1"]
        worst = [
            max(row[kind] / row["averaged, fresh"] for row in every)
            for kind in ("averaged", "averaged, statistics of training")
        ]
        lines.append(f"| {network} | worst from 2 on | | | | | {_percent(worst[0], 1)} | {_percent(worst[1], 1)} |")
    return "\n".join(lines) + "\n"


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).quantile(0.5))


def _percent(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.0f} %"


def main() -> int:
    """Make the missing runs, and write the table."""
    options = parser_of_pieces(__doc__, plots=False).parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    path = options.results / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    missing = [(n, str(s)) for s in SEEDS for n in NETWORKS if str(s) not in results.get(n, {})]
    for network, seed in missing[: options.pieces]:
        losses = measure(NETWORKS[network](), int(seed))
        results.setdefault(network, {})[seed] = {str(step): row for step, row in losses.items()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.results / f"{NAME}.md").write_text(table(results))
        print(table({network: {seed: results[network][seed]}}), flush=True)
    return 3 if options.pieces is not None and len(missing) > options.pieces else 0


if __name__ == "__main__":
    raise SystemExit(main())
