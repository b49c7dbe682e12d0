"""Contestants of the recipes, and runs that validate weights and their average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.away.contestants import thirds
from benchmarks.contest.contestants import SHIPPED, hidden_matrices
from benchmarks.contest.harness import RandomStream, TakesTurns
from benchmarks.contest.optimizers import BatchLoss, KFCStepper, PlainStepper
from benchmarks.recipes.recipes import Recipe
from lightning_kfc import KFC
from lightning_kfc.callback.averaged_weights import AveragedWeights

#: The optimizer's weights, and the callback's default average.
PLAIN, AVERAGED = "none", "0.9"
AVERAGES = (PLAIN, AVERAGED)
#: Validations of the longest run; shorter ones validate as often.
VALIDATIONS = 16
#: The learning rate at which AdamW's decay shrinks weights as KFC's does: AdamW's default.
USUAL_RATE = 1e-3


@dataclass(frozen=True)
class Trainee:
    """An optimizer of the contest.

    Attributes:
        title: The title in tables.
        make: A function of model, recipe, learning rate and seed to a stepper and its optimizer.
        grid: The tried learning rates; a single one is not searched.
    """

    title: str
    make: Callable[[nn.Module, Recipe, float, int], tuple[PlainStepper | KFCStepper, Optimizer]]
    grid: tuple[float, ...]


def _sgd(model: nn.Module, recipe: Recipe, lr: float, seed: int) -> tuple[PlainStepper, Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=recipe.sgd_decay)
    return PlainStepper(optimizer), optimizer


def _adamw(model: nn.Module, recipe: Recipe, lr: float, seed: int) -> tuple[PlainStepper, Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=recipe.decay)
    return PlainStepper(optimizer), optimizer


def _muon(model: nn.Module, recipe: Recipe, lr: float, seed: int) -> tuple[PlainStepper, Optimizer]:
    # Set up as in the contest; convolutions are flattened to matrices.
    from pytorch_optimizer import Muon

    weights, others = hidden_matrices(model)
    shared = {"lr": lr, "weight_decay": recipe.decay}
    groups = [{"params": weights, "use_muon": True, **shared}, {"params": others, "use_muon": False, **shared}]
    optimizer: Optimizer = Muon(groups, use_adjusted_lr=True)
    return PlainStepper(optimizer), optimizer


def _soap(model: nn.Module, recipe: Recipe, lr: float, seed: int) -> tuple[PlainStepper, Optimizer]:
    from pytorch_optimizer import SOAP

    optimizer: Optimizer = SOAP(model.parameters(), lr=lr, weight_decay=recipe.decay)
    return PlainStepper(optimizer), optimizer


def _kfc(model: nn.Module, recipe: Recipe, lr: float, seed: int) -> tuple[KFCStepper, Optimizer]:
    momentum = 0.5
    # The callback's replacement of AdamW's decay: weights shrink as much per step.
    decay = recipe.decay * USUAL_RATE * (1 - momentum) / lr
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    return KFCStepper(KFC(model, seed=seed, **SHIPPED), optimizer), optimizer


KFC_NAME = "kfc"
TRAINEES = {
    KFC_NAME: Trainee("KFC, defaults", _kfc, (0.5,)),
    "sgd": Trainee("SGD, Nesterov", _sgd, thirds(0.05)),
    "adamw": Trainee("AdamW", _adamw, thirds(0.004)),
    "muon": Trainee("Muon", _muon, thirds(0.016)),
    "soap": Trainee("SOAP", _soap, thirds(0.004)),
}


class Training(TakesTurns):
    """One run of a recipe.

    The seed sets the initial weights and the batches, equal for all optimizers. Seconds are CPU seconds of the steps;
    those of the average count for the average alone.

    Attributes:
        stepper: Makes the steps.
        step_seconds: CPU seconds of the steps so far, without the average's.
        epochs: The epochs, by validation.
        seconds: The seconds, by average and validation.
        values: The metric, by average and validation; infinite after divergence.
        losses: The loss, by average and validation.

    Args:
        recipe: The recipe.
        name: The name of the optimizer.
        lr: The highest learning rate.
        length: The length of the schedule, as a share of the longest.
        seed: The seed of all random numbers.
        validations: The number of validations of the longest run.
    """

    def __init__(
        self, recipe: Recipe, name: str, lr: float, length: float, seed: int, validations: int = VALIDATIONS
    ) -> None:
        self.recipe, self.name, self.lr, self.length = recipe, name, lr, length
        self.total = recipe.steps(length)
        self._spacing = max(1, recipe.steps(1) // validations)
        self._random = RandomStream(seed)
        with self._random.entered():
            self.model = recipe.make_model()
            self.stepper, self._optimizer = TRAINEES[name].make(self.model, recipe, lr, seed)
            self._batches = recipe.batches(seed)
            self._average = AveragedWeights(self.model, float(AVERAGED))
        self._done, self.step_seconds, self._average_seconds = 0, 0.0, 0.0
        self.epochs: list[float] = []
        self.seconds: dict[str, list[float]] = {average: [] for average in AVERAGES}
        self.values: dict[str, list[float]] = {average: [] for average in AVERAGES}
        self.losses: dict[str, list[float]] = {average: [] for average in AVERAGES}
        self._diverged = False

    def over(self) -> bool:
        """Whether the run is over."""
        return self._diverged or self._done >= self.total

    def _step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * self.recipe.schedule(self._done / self.total)
        inputs, targets = next(self._batches)
        begun = time.process_time()
        self._average.step_begins(self._optimizer)
        started = time.process_time()
        try:
            self.stepper.step(BatchLoss(self.model, self.recipe.loss, inputs, targets))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's stubs leave it out
            self._diverged = True
        stepped = time.process_time()
        self._average.update(self._optimizer)
        self._average_seconds += time.process_time() - stepped + started - begun
        self.step_seconds += stepped - started
        self._done += 1
        if self._done % self._spacing == 0 or self.over():
            self._validate()

    def _validate(self) -> None:
        plain = self.recipe.validate(self.model)
        self._average.put_in()
        averaged = self.recipe.validate(self.model)
        self._average.take_out()
        self._diverged |= not math.isfinite(plain[1])
        self.epochs.append(self._done / self.recipe.steps_per_epoch)
        for average, (value, loss) in ((PLAIN, plain), (AVERAGED, averaged)):
            more = self._average_seconds if average == AVERAGED else 0.0
            self.seconds[average].append(self.step_seconds + more)
            self.values[average].append(math.inf if self._diverged else value)
            self.losses[average].append(math.inf if self._diverged else loss)

    def best_average(self) -> str:
        """The average with the lower value at the end."""
        return min(AVERAGES, key=lambda average: self.values[average][-1])
