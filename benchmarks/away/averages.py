"""Runs with averages of their weights, so that one run measures an optimizer with and without averages."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.contest.curves import Curve
from benchmarks.contest.harness import Run
from benchmarks.contest.optimizers import BatchLoss, Contestant, Stepper
from benchmarks.contest.tasks import Task
from lightning_kfc.callback.averaged_statistics import POWER, newest_share

#: The name of the weights without an average.
NONE = "none"
#: The decays of the averages.
DECAYS = (0.8, 0.9)
#: The evaluated averages of one run.
AVERAGES = (NONE, *(f"{decay:g}" for decay in DECAYS))
#: The spacing of evaluations of the training loss, as in the search for learning rates.
SPACING = 8


class Average:
    """An average of a model's weights, as that of the callback.

    Args:
        model: The model; its buffers are copied.
        decay: The share of the average that stays at each later step.
        power: The power of the polynomial-decay average of the first steps.

    Attributes:
        seconds: CPU seconds that the updates took.
    """

    def __init__(self, model: nn.Module, decay: float, power: int = POWER) -> None:
        self._model, self._decay, self._power = model, decay, power
        self._copy = copy.deepcopy(model)
        self._steps = 0
        self.seconds = 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Mix in the present weights."""
        started = time.process_time()
        self._steps += 1
        weight = newest_share(self._steps, self._decay, self._power)
        torch._foreach_lerp_(list(self._copy.parameters()), list(self._model.parameters()), weight)
        self.seconds += time.process_time() - started

    @torch.no_grad()
    def model(self) -> nn.Module:
        """A model with the averaged weights."""
        for own, current in zip(self._copy.buffers(), self._model.buffers(), strict=True):
            own.copy_(current)
        return self._copy


#: The evaluated averages, by name.
BY_DECAY = {f"{decay:g}": partial(Average, decay=decay) for decay in DECAYS}


class KeepingStepper(Stepper):
    """Another stepper, with averages of its weights."""

    def __init__(self, stepper: Stepper, averages: Mapping[str, Average]) -> None:
        self._stepper = stepper
        self.averages = averages

    def step(self, compute_loss: BatchLoss) -> None:
        """See :class:`Stepper`."""
        self._stepper.step(compute_loss)
        for average in self.averages.values():
            average.update()

    def evaluated(self, model: nn.Module) -> dict[str, nn.Module]:
        """The evaluated models, by average; without an average, the model or the optimizer's own average."""
        own = self._stepper.averaged
        averaged = {name: average.model() for name, average in self.averages.items()}
        return {NONE: model if own is None else own, **averaged}

    def seconds(self, name: str) -> float:
        """The CPU seconds of a run that a run with this average alone would not have."""
        return sum(average.seconds for other, average in self.averages.items() if other != name)


class AveragedRun(Run):
    """A run with a loss curve for each average, up to the target; ``curve`` is the lowest unfinished one.

    Attributes:
        curves: The curves, by average.
    """

    _stepper: KeepingStepper

    def __init__(
        self,
        task: Task,
        contestant: Contestant,
        lr: float,
        seed: int,
        seconds: float | None = None,
        spacing: int = SPACING,
        averages: Mapping[str, Callable[[nn.Module], Average]] = BY_DECAY,
    ) -> None:
        def make(model: nn.Module, rate: float, random_seed: int) -> Stepper:
            kept = {name: average(model) for name, average in averages.items()}
            return KeepingStepper(contestant.make(model, rate, random_seed), kept)

        super().__init__(task, replace(contestant, make=make), lr, seed, seconds=seconds, spacing=spacing)
        self.curves = {name: Curve([0], [0.0], list(self.curve.losses)) for name in (NONE, *averages)}

    def arrived(self, average: str) -> bool:
        """Whether the target is reached with this average."""
        return math.isfinite(self.curves[average].reach(self.task.targets[-1]).iterations)

    def _evaluate(self) -> None:
        losses = {}
        for name, model in self._stepper.evaluated(self.model).items():
            if self.arrived(name):
                continue
            losses[name] = self.task.training_loss(model)
            self.curves[name].append(self._iteration, self._seconds - self._stepper.seconds(name), losses[name])
        if not losses:
            return
        best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
        self.curve.append(self._iteration, self.curves[best].seconds[-1], losses[best])
