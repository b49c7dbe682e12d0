"""The schedule of refreshes, and values that depend on the step; both without state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lightning_kfc.utilities.checks import check_integer, check_positive


@dataclass(frozen=True)
class RefreshSchedule:
    """The dates of statistics and inverses.

    During the warm-up the factors are refreshed at every step, and the inverses at steps 0, 1, 2, 3, then at every
    second step, and at the last one: curvature changes fastest at the start, and the first averages are means of few
    batches. The two periods apply after the warm-up.

    Attributes:
        factor_every_n_steps: Period of the statistics, in optimizer steps (the paper's T_cov).
        inverse_every_n_steps: Period of the inverses, in optimizer steps (the paper's T_inv).
        warmup_steps: Length of the warm-up, in optimizer steps.
    """

    factor_every_n_steps: int = 10
    inverse_every_n_steps: int = 20
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        """Check the three numbers."""
        check_integer("factor_every_n_steps", self.factor_every_n_steps, minimum=1)
        check_integer("inverse_every_n_steps", self.inverse_every_n_steps, minimum=1)
        check_integer("warmup_steps", self.warmup_steps, minimum=0)

    def factors_due(self, step: int) -> bool:
        """Whether statistics are taken at this step (counted from 0)."""
        return step < self.warmup_steps or step % self.factor_every_n_steps == 0

    def inverses_due(self, step: int) -> bool:
        """Whether inverses are refreshed at this step (counted from 0)."""
        if step < self.warmup_steps:
            return step <= 3 or step % 2 == 1
        return step == self.warmup_steps or step % self.inverse_every_n_steps == 0

    def last_factors_due(self, step: int) -> int:
        """The latest step, up to this one, at which statistics are taken."""
        return self._last(self.factors_due, step, self.factor_every_n_steps)

    def last_inverses_due(self, step: int, offset: int | None = None) -> int:
        """The latest step, up to this one, at which inverses are refreshed.

        Args:
            step: Counted from 0.
            offset: The step of the period at which they are refreshed from the end of the warm-up on; None for the
                schedule's own dates.
        """
        end = max(self.warmup_steps, 1)
        if offset is None or step < end:
            return self._last(self.inverses_due, step, self.inverse_every_n_steps)
        date = step - (step - offset) % self.inverse_every_n_steps
        return date if date >= end else self.last_inverses_due(end - 1)

    def _last(self, due: Callable[[int], bool], step: int, period: int) -> int:
        if step > self.warmup_steps:
            return max(step - step % period, self._last(due, self.warmup_steps, period))
        # Step 0 is a date of both kinds, so the search ends.
        return next(past for past in range(step, -1, -1) if due(past))


@dataclass(frozen=True)
class Schedule(ABC):
    """A value that moves from ``start`` to ``end``, then stays.

    The class is abstract because jsonargparse drops the ``class_path`` of a plain dataclass, so that two schedules with
    the same fields would be the same in YAML.

    Attributes:
        start: The value at step 0; positive.
        end: The value from step ``steps`` on; positive.
        steps: Length in optimizer steps.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        """Check the three numbers."""
        check_positive("start", self.start)
        check_positive("end", self.end)
        check_integer("steps", self.steps, minimum=1)

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at a step."""


@dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    """A value that moves from ``start`` to ``end`` by a constant factor a step, then stays.

    Attributes:
        start: The value at step 0; positive.
        end: The value from step ``steps`` on; positive.
        steps: Length in optimizer steps.
    """

    def __call__(self, step: int) -> float:
        """The value at a step."""
        done = min(step / self.steps, 1.0)
        return float(self.start ** (1.0 - done) * self.end**done)


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """A value that moves from ``start`` to ``end`` by a constant difference a step, then stays.

    Attributes:
        start: The value at step 0; positive.
        end: The value from step ``steps`` on; positive.
        steps: Length in optimizer steps.
    """

    def __call__(self, step: int) -> float:
        """The value at a step."""
        done = min(step / self.steps, 1.0)
        return float(self.start * (1.0 - done) + self.end * done)


def value_at(value: float | Callable[[int], float], step: int) -> float:
    """A constant, or a schedule's value at a step.

    Raises:
        ValueError: If a schedule raises, or its value is not a positive and finite number.
    """
    if not callable(value):
        return float(value)
    try:
        result = float(value(step))
    except Exception as error:
        raise ValueError(
            f"damping at step {step} could not be computed ({type(error).__name__}: {error}). Give a number, or a "
            "function of the step that returns one."
        ) from error
    check_positive(f"damping at step {step}", result)
    return result
