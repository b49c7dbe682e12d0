"""Parts of a recipe that work against KFC, and their replacements: ``python -m benchmarks.accuracy.recipes``.

Each case trains a small convolutional net on scikit-learn's digits twice with :class:`~lightning_kfc.KFCCallback`: by a
recipe for another optimizer, and with one part replaced. The results are medians of three seeds of the loss and the
error on held-out digits. The callback warns of a recipe if the replacement trains better here. A case is a piece; after
an interruption, the command continues with the missing pieces.

Written to ``results/recipes.{json,md}``.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, ExponentialLR, LinearLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.devices import quiet_trainer
from lightning_kfc import KFCCallback

SEEDS = (0, 1, 2)
TRAINED = 1000
NAME = "recipes"


@dataclass(frozen=True)
class Recipe:
    """A recipe for the training of a net.

    Attributes:
        text: Its relevant part, as code.
        optimizer: Makes the optimizer.
        scheduler: Makes the schedule from the optimizer and the number of steps.
        interval: Whether the schedule steps at each step or each epoch.
        trainer: Options of the Trainer.
        callback: Options of the callback.
        callbacks: Makes other callbacks.
        batch_size: Examples in a batch.
        epochs: The number of epochs.
        reduction: The reduction of the loss.
        widths: Channels of the convolutions, and units of the linear layer.
    """

    text: str
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = lambda p: SGD(p, lr=0.5, momentum=0.5)
    scheduler: Callable[[Optimizer, int], Any] | None = None
    interval: str = "step"
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callback: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], Sequence[Callback]] = tuple
    batch_size: int = 50
    epochs: int = 6
    reduction: str = "mean"
    widths: tuple[int, int, int] = (8, 16, 32)


@dataclass(frozen=True)
class Case:
    """A recipe, and its variant with one part replaced."""

    title: str
    against: Recipe
    instead: Recipe


def sgd(lr: float = 0.5, momentum: float = 0.5, **options: Any) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """SGD with these options."""
    return lambda parameters: SGD(parameters, lr=lr, momentum=momentum, **options)


def average() -> WeightAveraging:
    """Lightning's averaging of weights, with a decay for short runs."""
    return WeightAveraging(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))


USUAL = Recipe("SGD(lr=0.5, momentum=0.5)")
CASES = {
    "one_cycle": Case(
        "OneCycleLR",
        Recipe("OneCycleLR(optimizer, 0.5, steps)", scheduler=lambda o, n: OneCycleLR(o, 0.5, n)),
        Recipe(
            "OneCycleLR(optimizer, 0.5, steps, cycle_momentum=False)",
            scheduler=lambda o, n: OneCycleLR(o, 0.5, n, cycle_momentum=False),
        ),
    ),
    "one_cycle_adam": Case(
        "OneCycleLR, rule='adam'",
        Recipe(
            "OneCycleLR(optimizer, 0.5, steps)",
            scheduler=lambda o, n: OneCycleLR(o, 0.5, n),
            callback={"rule": "adam"},
        ),
        Recipe(
            "OneCycleLR(optimizer, 0.5, steps, cycle_momentum=False)",
            scheduler=lambda o, n: OneCycleLR(o, 0.5, n, cycle_momentum=False),
            callback={"rule": "adam"},
        ),
    ),
    "cyclic": Case(
        "CyclicLR",
        Recipe("CyclicLR(optimizer, 0.1, 0.5, 20)", scheduler=lambda o, n: CyclicLR(o, 0.1, 0.5, 20)),
        Recipe(
            "CyclicLR(optimizer, 0.1, 0.5, 20, cycle_momentum=False)",
            scheduler=lambda o, n: CyclicLR(o, 0.1, 0.5, 20, cycle_momentum=False),
        ),
    ),
    "adam": Case("Adam", Recipe("Adam(lr=1e-3)", lambda p: Adam(p, lr=1e-3)), USUAL),
    "adamw": Case(
        "AdamW",
        Recipe("AdamW(lr=1e-3, weight_decay=0.01)", lambda p: AdamW(p, lr=1e-3, weight_decay=0.01)),
        Recipe("SGD(lr=0.5, momentum=0.5, weight_decay=1e-5)", sgd(weight_decay=1e-5)),
    ),
    "rmsprop": Case("RMSprop", Recipe("RMSprop(lr=1e-3)", lambda p: RMSprop(p, lr=1e-3)), USUAL),
    "adamw_rule_adam": Case(
        "AdamW, rule='adam'",
        Recipe(
            "AdamW(lr=1e-3, weight_decay=0.01)",
            lambda p: AdamW(p, lr=1e-3, weight_decay=0.01),
            callback={"rule": "adam"},
        ),
        Recipe("SGD(lr=0.5, momentum=0.5, weight_decay=1e-5)", sgd(weight_decay=1e-5), callback={"rule": "adam"}),
    ),
    "adam_decay": Case(
        "weight decay inside Adam",
        Recipe("Adam(lr=1e-3, weight_decay=0.01)", lambda p: Adam(p, lr=1e-3, weight_decay=0.01)),
        Recipe("SGD(lr=0.5, momentum=0.5, weight_decay=1e-5)", sgd(weight_decay=1e-5)),
    ),
    "sgd_decay": Case(
        "the weight decay of AdamW, 400 steps",
        Recipe("SGD(lr=0.5, momentum=0.5, weight_decay=0.05)", sgd(weight_decay=0.05), epochs=20),
        Recipe("SGD(lr=0.5, momentum=0.5, weight_decay=1e-5)", sgd(weight_decay=1e-5), epochs=20),
    ),
    "low_rate": Case("a low learning rate", Recipe("SGD(lr=0.01, momentum=0.9)", sgd(0.01, 0.9)), USUAL),
    **{
        f"low_rate_{rate:g}": Case("a low learning rate", Recipe(f"SGD(lr={rate:g}, momentum=0.5)", sgd(rate)), USUAL)
        for rate in (0.001, 0.005, 0.02)
    },
    "momentum_long": Case(
        "a high momentum, 400 steps",
        Recipe("SGD(lr=0.1, momentum=0.9)", sgd(0.1, 0.9), epochs=20),
        Recipe("SGD(lr=0.5, momentum=0.5)", epochs=20),
    ),
    "momentum_longer": Case(
        "a high momentum, 2,000 steps",
        Recipe("SGD(lr=0.1, momentum=0.9)", sgd(0.1, 0.9), epochs=100),
        Recipe("SGD(lr=0.5, momentum=0.5)", epochs=100),
    ),
    "high_rate": Case("a high learning rate", Recipe("SGD(lr=3, momentum=0.5)", sgd(3.0)), USUAL),
    "high_rate_cosine": Case(
        "a high learning rate",
        Recipe("SGD(lr=3), CosineAnnealingLR(steps)", sgd(3.0), lambda o, n: CosineAnnealingLR(o, n)),
        Recipe("SGD(lr=0.5), CosineAnnealingLR(steps)", scheduler=lambda o, n: CosineAnnealingLR(o, n)),
    ),
    "momentum": Case("a high momentum", Recipe("SGD(lr=0.5, momentum=0.9)", sgd(0.5, 0.9)), USUAL),
    "momentum_low": Case("momentum 0.9 at a low rate", Recipe("SGD(lr=0.1, momentum=0.9)", sgd(0.1, 0.9)), USUAL),
    "high_rate_adam": Case(
        "a high learning rate, rule='adam'",
        Recipe("SGD(lr=3, momentum=0.5)", sgd(3.0), callback={"rule": "adam"}),
        Recipe("SGD(lr=0.5, momentum=0.5)", callback={"rule": "adam"}),
    ),
    "momentum_adam": Case(
        "a high momentum, rule='adam'",
        Recipe("SGD(lr=0.5, momentum=0.9)", sgd(0.5, 0.9), callback={"rule": "adam"}),
        Recipe("SGD(lr=0.5, momentum=0.5)", callback={"rule": "adam"}),
    ),
    "low_rate_adam": Case(
        "a low learning rate, rule='adam'",
        Recipe("SGD(lr=0.02, momentum=0.5)", sgd(0.02), callback={"rule": "adam"}),
        Recipe("SGD(lr=0.5, momentum=0.5)", callback={"rule": "adam"}),
    ),
    "epoch_interval": Case(
        "a schedule of steps that goes on by epochs",
        Recipe(
            "OneCycleLR(..., steps, cycle_momentum=False)",
            scheduler=lambda o, n: OneCycleLR(o, 0.5, n, cycle_momentum=False),
            interval="epoch",
        ),
        Recipe('the same with "interval": "step"', scheduler=lambda o, n: OneCycleLR(o, 0.5, n, cycle_momentum=False)),
    ),
    "early_end": Case(
        "a learning rate that vanishes early",
        Recipe("ExponentialLR(gamma=0.9), at each step", scheduler=lambda o, n: ExponentialLR(o, 0.9)),
        Recipe("CosineAnnealingLR(steps)", scheduler=lambda o, n: CosineAnnealingLR(o, n)),
    ),
    "growing": Case(
        "a learning rate that grows past 1",
        Recipe("SGD(lr=5), LinearLR(0.02, 1, steps)", sgd(5.0), lambda o, n: LinearLR(o, 0.02, 1.0, n)),
        Recipe("CosineAnnealingLR(steps)", scheduler=lambda o, n: CosineAnnealingLR(o, n)),
    ),
    **{
        f"clip_{value:g}": Case(
            "clipped gradients",
            Recipe(f"gradient_clip_val={value:g}", trainer={"gradient_clip_val": value}),
            Recipe("no clipping"),
        )
        for value in (0.01, 0.03, 0.1, 0.3, 1.0)
    },
    **{
        f"clip_high_rate_{value:g}": Case(
            "clipped gradients, SGD(lr=1, momentum=0.9)",
            Recipe(f"gradient_clip_val={value:g}", sgd(1.0, 0.9), trainer={"gradient_clip_val": value}),
            Recipe("no clipping", sgd(1.0, 0.9)),
        )
        for value in (0.1,)
    },
    "ema_swa": Case(
        "WeightAveraging beside StochasticWeightAveraging",
        Recipe("both", callbacks=lambda: [average(), StochasticWeightAveraging(0.05, 0.5)]),
        Recipe("WeightAveraging", callbacks=lambda: [average()]),
    ),
    "swa_rate": Case(
        "a low rate of StochasticWeightAveraging",
        Recipe("swa_lrs=0.001", callbacks=lambda: [StochasticWeightAveraging(0.001, 0.5)]),
        Recipe("swa_lrs=0.1", callbacks=lambda: [StochasticWeightAveraging(0.1, 0.5)]),
    ),
    "sum_accumulated": Case(
        "summed losses that are accumulated",
        Recipe('reduction="sum"', trainer={"accumulate_grad_batches": 2}, batch_size=25, reduction="sum"),
        Recipe('reduction="mean"', trainer={"accumulate_grad_batches": 2}, batch_size=25),
    ),
    "small_batch": Case(
        "a batch far smaller than the factors",
        Recipe("ema_decay=0.8", batch_size=4, epochs=1),
        Recipe("ema_decay=0.95", batch_size=4, epochs=1, callback={"ema_decay": 0.95}),
    ),
    "small_batch_adam": Case(
        "a batch far smaller than the factors, the rule adam",
        Recipe("rule='natural'", batch_size=4, epochs=1),
        Recipe("rule='adam'", batch_size=4, epochs=1, callback={"rule": "adam"}),
    ),
    "one_example": Case(
        "steps of one example",
        Recipe("batch_size=1", batch_size=1, epochs=1),
        Recipe("accumulate_grad_batches=16", trainer={"accumulate_grad_batches": 16}, batch_size=1, epochs=1),
    ),
    "two_examples": Case(
        "steps of two examples",
        Recipe("batch_size=2", batch_size=2, epochs=1),
        Recipe("accumulate_grad_batches=8", trainer={"accumulate_grad_batches": 8}, batch_size=2, epochs=1),
    ),
    "short_run": Case(
        "a run shorter than the warm-up and a period",
        Recipe("warmup_steps=10", epochs=1),
        Recipe("warmup_steps=20", epochs=1, callback={"warmup_steps": 20}),
    ),
    "very_short_run": Case(
        "a run of 8 steps",
        Recipe("warmup_steps=2", epochs=1, batch_size=125, callback={"warmup_steps": 2}),
        Recipe("warmup_steps=10", epochs=1, batch_size=125),
    ),
}

#: The cases with a warning of the callback; the replacements of the other cases are no better.
AT_START = frozenset(
    (
        "adam",
        "adam_decay",
        "adamw",
        "adamw_rule_adam",
        "cyclic",
        "early_end",
        "high_rate_adam",
        "low_rate_0.001",
        "low_rate_adam",
        "momentum_adam",
        "one_cycle",
        "one_cycle_adam",
        "rmsprop",
        "sgd_decay",
        "short_run",
        "very_short_run",
    )
)
#: The cases whose momentum the callback limits, with a line that says so; their replacements are no better.
LIMITED = frozenset(("clip_high_rate_0.1", "low_rate", "momentum", "momentum_long", "momentum_longer", "momentum_low"))
IN_COURSE = frozenset(("clip_0.01", "clip_0.03", "clip_0.1", "clip_0.3", "one_example", "two_examples"))


class Digits(pl.LightningModule):
    """A small convolutional net with dropout, trained by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        first, second, hidden = recipe.widths
        self.net = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(second * 16, hidden),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(hidden, 10),
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels, reduction=self.recipe.reduction)

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer and schedule."""
        optimizer = self.recipe.optimizer(self.parameters())
        if self.recipe.scheduler is None:
            return optimizer
        schedule = self.recipe.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": self.recipe.interval},
        }


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """Digits to train on, and held-out ones with their labels."""
    found = load_digits()
    inputs = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, labels = inputs[order], labels[order]
    return TensorDataset(inputs[:TRAINED], labels[:TRAINED]), inputs[TRAINED:], labels[TRAINED:]


def train(recipe: Recipe, seed: int) -> tuple[float, float]:
    """The loss, and the error in percent, on held-out digits at the end."""
    pl.seed_everything(seed, verbose=False)
    data, inputs, labels = digits()
    module = Digits(recipe)
    trainer = quiet_trainer(
        "cpu",
        max_epochs=recipe.epochs,
        callbacks=[KFCCallback(**{"average_weights": None, **recipe.callback}), *recipe.callbacks()],
        **recipe.trainer,
    )
    trainer.fit(module, DataLoader(data, batch_size=recipe.batch_size, shuffle=True, drop_last=True))
    module.eval()
    with torch.no_grad():
        outputs = module.net(inputs)
    return float(F.cross_entropy(outputs, labels)), 100 * float((outputs.argmax(1) != labels).double().mean())


def table(results: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """The table of all measured cases."""
    lines = [
        "| part of the recipe | as it was | loss, error | replaced by | loss, error | advised |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        if name in results:
            cells = [case.title]
            for recipe, runs in ((case.against, results[name]["against"]), (case.instead, results[name]["instead"])):
                loss, error = (median(column) for column in zip(*runs, strict=True))
                cells += [f"`{recipe.text}`", f"{loss:.3f}, {error:.1f} %" if math.isfinite(loss) else "diverged"]
            kinds = {"at the start": AT_START, "in the course": IN_COURSE, "limited": LIMITED}
            cells.append(next((kind for kind, names in kinds.items() if name in names), "no"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train the missing cases, and write the table."""
    parser = parser_of_pieces(__doc__, plots=False)
    parser.add_argument("cases", nargs="*", help="names of cases; by default all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    path = options.results / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    wanted = [name for name in options.cases or CASES if name not in results]
    for name in wanted[: options.pieces]:
        case = CASES[name]
        results[name] = {
            kind: [train(recipe, seed) for seed in SEEDS]
            for kind, recipe in (("against", case.against), ("instead", case.instead))
        }
        path.write_text(json.dumps({key: results[key] for key in CASES if key in results}, indent=1) + "\n")
        (options.results / f"{NAME}.md").write_text(table(results))
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    return 3 if any(name not in results for name in wanted) else 0


if __name__ == "__main__":
    raise SystemExit(main())
