"""The user's damping, a number or a function of the step."""

from __future__ import annotations

from collections.abc import Callable

from lightning_kfc.monitoring.events import Events
from lightning_kfc.scheduling.refresh_schedule import value_at


class ScheduledDamping:
    """The user's damping, evaluated once a step.

    After the first step, an invalid value leaves the last one in force.

    Args:
        setting: A number, or a function of the step.
        events: Counts invalid values.
    """

    def __init__(self, setting: float | Callable[[int], float], events: Events) -> None:
        self._setting = setting
        self._events = events
        self._last: tuple[int, float] | None = None

    def at(self, step: int) -> float:
        """The damping in force at a step.

        Raises:
            ValueError: If the first value is not a positive number.
        """
        if self._last is None:
            self._last = step, value_at(self._setting, step)
        elif self._last[0] != step:
            self._last = step, self._next(step, self._last[1])
        return self._last[1]

    def _next(self, step: int, last: float) -> float:
        try:
            return value_at(self._setting, step)
        except ValueError as error:
            self._events.report("invalid_dampings", step, f"{str(error).rstrip('.')}; {last:g} is used instead")
            return last
