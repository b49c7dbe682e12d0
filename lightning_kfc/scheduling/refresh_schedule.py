"""The schedule of refreshes, and values that depend on the step; both without state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lightning_kfc.utilities.checks import check_integer, check_positive

#: From this step on, the periods are longer.
LATER_FROM = 100


@dataclass(frozen=True)
class RefreshSchedule:
    """The dates of statistics and inverses.

    Dates are the multiples of the two periods, from step :data:`LATER_FROM` on of longer ones. During the warm-up,
    factors are refreshed at every step too, and inverses at steps 0, 1, 2, 3, then at every second step, and at the
    end: curvature changes fastest at the start, and the first averages are means of few batches.

    Attributes:
        factor_every_n_steps: Period of the statistics, in optimizer steps (the paper's T_cov).
        inverse_every_n_steps: Period of the inverses, in optimizer steps (the paper's T_inv).
        warmup_steps: Length of the warm-up, in optimizer steps.
        later_periods: The factor on both periods from step :data:`LATER_FROM` on.
    """

    factor_every_n_steps: int = 10
    inverse_every_n_steps: int = 20
    warmup_steps: int = 10
    later_periods: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_integer("factor_every_n_steps", self.factor_every_n_steps, minimum=1)
        check_integer("inverse_every_n_steps", self.inverse_every_n_steps, minimum=1)
        check_integer("warmup_steps", self.warmup_steps, minimum=0)
        check_integer("later_periods", self.later_periods, minimum=1)

    def factor_period(self, step: int) -> int:
        """The period of the statistics at this step (counted from 0)."""
        return self._at(self.factor_every_n_steps, step)

    def _at(self, period: int, step: int) -> int:
        """The period at a step; later a multiple, so that later dates are also dates of the shorter period."""
        return period if step < LATER_FROM else period * self.later_periods

    def factors_due(self, step: int) -> bool:
        """Whether statistics are taken at this step (counted from 0)."""
        return step < self.warmup_steps or step % self.factor_period(step) == 0

    def inverses_due(self, step: int) -> bool:
        """Whether inverses are refreshed at this step (counted from 0)."""
        if step < self.warmup_steps and (step <= 3 or step % 2 == 1):
            return True
        return step == self.warmup_steps or step % self._at(self.inverse_every_n_steps, step) == 0

    def last_factors_due(self, step: int) -> int:
        """The latest step, up to this one, at which statistics are taken."""
        return self._last(self.factors_due, step, self.factor_every_n_steps)

    def last_inverses_due(self, step: int, offset: int | None = None) -> int:
        """The latest step, up to this one, at which inverses are refreshed.

        Args:
            step: Counted from 0.
            offset: At which step of the period they are refreshed once the warm-up is over, the step that ends it
                included; None for all at the schedule's own dates.
        """
        end = max(self.warmup_steps, 1)
        if offset is None or step < end:
            return self._last(self.inverses_due, step, self.inverse_every_n_steps)
        date = self._last_in_turn(step, self.inverse_every_n_steps, offset, end)
        return self.last_inverses_due(end - 1) if date is None else date

    def _last(self, due: Callable[[int], bool], step: int, period: int) -> int:
        date = self._last_in_turn(step, period, 0, self.warmup_steps + 1)
        if date is not None:
            return date
        # Step 0 is a date of both kinds, so the search ends.
        return next(past for past in range(min(step, self.warmup_steps), -1, -1) if due(past))

    def _last_in_turn(self, step: int, period: int, offset: int, begin: int) -> int | None:
        """The latest date up to a step, and not before ``begin``, with this offset in its period; None without one."""
        later = max(LATER_FROM, begin)
        if step >= later:
            date = step - (step - offset) % self._at(period, step)
            if date >= later:
                return date
        date = min(step, later - 1)
        date -= (date - offset) % period
        return date if date >= begin else None


@dataclass(frozen=True)
class Schedule(ABC):
    """A value that moves from ``start`` to ``end``, then stays.

    An abstract class, not a plain dataclass: jsonargparse drops the ``class_path`` of the latter, and two
    schedules of the same fields would be one in YAML.

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
