"""Run contestants interleaved on a task, and measure their losses against iterations and CPU seconds."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from benchmarks.contest.curves import Curve
from benchmarks.contest.optimizers import BatchLoss, Contestant
from benchmarks.contest.tasks import Task

R = TypeVar("R", bound="TakesTurns")

#: Steps of a run in its turn; with short turns, a disturbance of the machine affects all runs.
BLOCK = 5
#: Evaluations of the training loss per doubling of the iterations.
SPACING = 16
#: Evaluations of the held-out loss per doubling of the iterations.
HELD_OUT_SPACING = 4
#: A run of a contest ends at this multiple of its iterations to the hardest target.
PAST_THE_TARGET = 1.5


def evaluation_due(iteration: int, spacing: int = SPACING) -> bool:
    """Whether a loss is evaluated after this iteration.

    Between 2^k and 2^(k+1) iterations there are at most ``spacing`` evaluations, so that fast and slow optimizers are
    resolved alike.
    """
    period = max(1, (1 << iteration.bit_length() - 1) // spacing)
    return iteration % period == 0


class RandomStream:
    """The global random state of one run, which other runs do not change."""

    def __init__(self, seed: int) -> None:
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from this stream inside, and restore the outer one."""
        outside = torch.get_rng_state(), np.random.get_state()
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._torch, self._numpy = torch.get_rng_state(), np.random.get_state()
            torch.set_rng_state(outside[0])
            np.random.set_state(outside[1])


class TakesTurns(ABC):
    """A run that advances in turns with others, each on a random stream of its own."""

    _random: RandomStream

    @abstractmethod
    def over(self) -> bool:
        """Whether the run is over."""

    @abstractmethod
    def _step(self) -> None:
        """Make one step, on the run's random stream."""

    def advance(self, steps: int) -> None:
        """Make more steps, until the run is over."""
        with self._random.entered():
            for _ in range(steps):
                if self.over():
                    return
                self._step()


class Run(TakesTurns):
    """One contestant with one learning rate and seed.

    The seed sets the initial weights and the order of the examples, the same for all contestants.

    Args:
        task: The task.
        contestant: The contestant.
        lr: The learning rate.
        seed: The seed of all random numbers.
        measure_held_out: Whether to measure held-out examples too: sometimes, at each target, and at the end.
        seconds: CPU seconds of steps after which the run is over; None for no limit.
        spacing: The spacing of evaluations; see :func:`evaluation_due`.
    """

    def __init__(
        self,
        task: Task,
        contestant: Contestant,
        lr: float,
        seed: int,
        measure_held_out: bool = False,
        seconds: float | None = None,
        spacing: int = SPACING,
    ) -> None:
        self.task = task
        self.contestant = contestant
        self.lr = lr
        self.seed = seed
        self.curve = Curve()
        self._limit = seconds
        self._spacing = spacing
        self._measure_held_out = measure_held_out
        self._random = RandomStream(seed)
        self._iteration = 0
        self._seconds = 0.0
        with self._random.entered():
            self.model = task.make_model()
            self._stepper = contestant.make(self.model, lr, seed)
            self._batches = task.batches(seed)
            self.curve.append(0, 0.0, task.training_loss(self.model))

    def _step(self) -> None:
        inputs, targets = next(self._batches)
        started = time.process_time()
        self._stepper.step(BatchLoss(self.model, self.task.loss, inputs, targets))
        self._seconds += time.process_time() - started
        self._iteration += 1
        if evaluation_due(self._iteration, self._spacing) or self._exhausted():
            self._evaluate()

    def _evaluate(self) -> None:
        model = self.model if self._stepper.averaged is None else self._stepper.averaged
        best = min(self.curve.losses)
        loss = self.task.training_loss(model)
        self.curve.append(self._iteration, self._seconds, loss)
        if self._measure_held_out and (
            evaluation_due(self._iteration, HELD_OUT_SPACING)
            or any(loss <= target < best for target in self.task.targets)
            or self.over()
        ):
            self.curve.held_out.append(self.task.held_out(model, self._iteration))

    def _exhausted(self) -> bool:
        out_of_time = self._limit is not None and self._seconds >= self._limit
        return self._iteration >= self.task.budget or out_of_time

    def over(self) -> bool:
        """Whether the budget has ended, or the run has diverged."""
        return self._exhausted() or self.curve.diverged()


def interleave(runs: Sequence[R], until: Callable[[R], bool] | None = None, block: int = BLOCK) -> None:
    """Advance all runs in turns of a block of steps, each until it is over or ``until`` holds."""
    going = list(runs)
    while going:
        for run in going:
            run.advance(block)
        going = [run for run in going if not (run.over() or (until is not None and until(run)))]


def compete(task: Task, contestants: Sequence[Contestant], lrs: Mapping[str, float], seed: int) -> dict[str, Curve]:
    """Run all contestants with their learning rates on one seed.

    A run ends some way past the task's hardest target, at the budget, or after the task's seconds.

    Returns:
        Each contestant's curve.
    """
    runs = [
        Run(task, contestant, lrs[contestant.name], seed, measure_held_out=True, seconds=task.goal.seconds)
        for contestant in contestants
    ]
    interleave(runs, until=_far_past_its_target)
    return {run.contestant.name: run.curve for run in runs}


def _far_past_its_target(run: Run) -> bool:
    reached = run.curve.reach(run.task.targets[-1]).iterations
    return run.curve.iterations[-1] >= PAST_THE_TARGET * reached
