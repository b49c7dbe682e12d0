"""The numbers of a training over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_kfc.monitoring.events import History

#: Numbers that differ by less than this share look the same in a chart.
FLAT_SHARE = 1e-6


class MeasuredNumbers:
    """Holds the engine's numbers and the module's metrics at the steps of their measurement.

    A trainer holds old values of metrics too; a new measurement is a new tensor, by which it is recognised.

    Args:
        trainer: The trainer.
        keeps: Whether to hold numbers at all.
    """

    def __init__(self, trainer: Any, *, keeps: bool) -> None:
        self._trainer = trainer
        self._keeps = keeps
        self._known: dict[str, object] = {}
        self._of_steps: set[str] = set()
        self._of_validation: set[str] = set()
        self._logged = False
        self.history = History()

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the engine's numbers of a logged step."""
        if self._keeps:
            self.history.add(step, numbers)
            self._logged = True

    def step_ends(self, step: int, outputs: object) -> None:
        """Add the measurements of a training step, if it is logged.

        Args:
            step: The number of this step in loggers.
            outputs: The training step's return value, whose loss replaces an unlogged loss.
        """
        if not self._logged:
            return
        self._logged = False
        fresh = {key: value for key, value in self._fresh().items() if key not in self._of_validation}
        if isinstance(outputs, Mapping) and not any("loss" in key for key in fresh):
            fresh["loss"] = outputs.get("loss")
        self._of_steps |= fresh.keys()
        self._add(step, fresh)

    def validation_ends(self, step: int) -> None:
        """Add the numbers of a validation after this step, since the call of :meth:`ignore`."""
        fresh = self._fresh()
        self._of_validation |= fresh.keys()
        self._add(step, fresh)

    def epoch_ends(self, step: int) -> None:
        """Add the numbers of a training epoch that ended with this step."""
        by_now = self._of_steps | self._of_validation
        self._add(step, {key: value for key, value in self._fresh().items() if key not in by_now})

    def ignore(self) -> None:
        """Ignore the present values of the trainer's metrics."""
        self._fresh()

    def moving(self) -> dict[str, Sequence[tuple[int, float]]]:
        """The series that change: losses, numbers of validation, other metrics of the module, the engine's numbers."""
        found = {key: points for key, points in self.history.series().items() if not is_flat(points)}

        def place(key: str) -> tuple[bool, bool, bool]:
            return key.startswith("kfc/"), "loss" not in key, key not in self._of_validation

        return {key: found[key] for key in sorted(found, key=place)}

    def flat(self) -> dict[str, float]:
        """The last number of each constant series, whose chart would show nothing."""
        return {key: points[-1][1] for key, points in self.history.series().items() if is_flat(points)}

    def _fresh(self) -> dict[str, object]:
        if not self._keeps:
            return {}
        now = dict(self._trainer.callback_metrics)
        fresh = {key: value for key, value in now.items() if self._known.get(key) is not value}
        self._known = now
        return fresh

    def _add(self, step: int, numbers: Mapping[str, object]) -> None:
        self.history.add(
            step, {key: number for key, value in numbers.items() if (number := _number(value)) is not None}
        )


def is_flat(points: Sequence[tuple[int, float]]) -> bool:
    """Whether all finite numbers of a series are equal."""
    finite = [value for _, value in points if abs(value) < float("inf")]
    return not finite or max(finite) - min(finite) <= FLAT_SHARE * max(map(abs, finite))


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    return None
