"""Counts of events, numbers of the last step, and their history."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from lightning_kfc.distributed import process_group as distributed


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for a message; many are cut short."""
    return shortened(map(repr, names))


def shortened(entries: Iterable[str], most: int = 5) -> str:
    """Entries of a list, for a message; many are cut short."""
    entries = list(entries)
    return ", ".join(entries[:most]) + (f" and {len(entries) - most} more" if len(entries) > most else "")


@dataclass
class Events:
    """Counts of irregular events over the whole training.

    Attributes:
        nonfinite_gradients: Steps whose gradients held a NaN or an infinity: their statistics were dropped, nothing
            was preconditioned, and the callback skipped the step.
        nonfinite_statistics: Steps in which a layer's statistics held a NaN or an infinity, and entered no average.
        empty_statistics: Steps in which a layer got no examples; its averages stayed.
        missing_second_moments: Layers, summed over steps, that kept their eigenvalues, since ``inverse="ekfac"`` had no
            usable gradients of single examples.
        failed_factorisations: Factorisations that failed at every damping; the last good inverse was kept.
        restored_inverses: Steps in which a layer returned to its last good inverse, since the update by
            its new one was not finite, or not a descent direction.
        nonfinite_updates: Steps in which a layer kept its plain gradient, since no inverse gave a usable update.
        undone_steps: Steps that increased the loss of their own batch, and were undone, or shortened to the best point
            on their way.
        shortened_steps: Steps that decreased the loss of their own batch far less than expected, and were shortened to
            the best point on their way.
        missed_reviews: Steps without their due review, since their losses were not recorded, or not replayed.
        invalid_dampings: Steps at which a damping schedule gave no positive number; the last valid one was used.
        restarted_layers: Layers whose averages started again, since their trainable parameters changed.
        unrecognised_losses: Losses without a recognised term: statistics came from the loss's own gradient, or, with a
            ``likelihood`` that no term has, were not taken.
        losses_without_gradient: Losses without a gradient, or with a zero one; no statistics were taken.
        failed_statistics: Steps whose statistics were lost to an error.
    """

    nonfinite_gradients: int = 0
    nonfinite_statistics: int = 0
    empty_statistics: int = 0
    missing_second_moments: int = 0
    failed_factorisations: int = 0
    restored_inverses: int = 0
    nonfinite_updates: int = 0
    undone_steps: int = 0
    shortened_steps: int = 0
    missed_reviews: int = 0
    invalid_dampings: int = 0
    restarted_layers: int = 0
    unrecognised_losses: int = 0
    losses_without_gradient: int = 0
    failed_statistics: int = 0

    def count(self, event: str) -> int:
        """Add one to a count, and return it."""
        setattr(self, event, getattr(self, event) + 1)
        return int(getattr(self, event))

    def report(self, event: str, step: int, what: str) -> None:
        """Count an event; warn about the first one of its kind, on rank zero."""
        if self.count(event) == 1 and distributed.rank() == 0:
            warnings.warn(f"KFC at step {step}: {what}. Later ones are only counted, in `kfc.events`.", stacklevel=3)

    def __str__(self) -> str:
        """The counts above zero, for a report."""
        return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in self.state_dict().items() if count)

    def state_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore counts by name; unknown names are left out."""
        for entry in fields(self):
            if entry.name in state:
                setattr(self, entry.name, int(state[entry.name]))


@dataclass(frozen=True)
class StepNumbers:
    r"""The numbers of the last preconditioned step.

    Attributes:
        step: Its number, from 0.
        damping: :math:`\lambda` in force.
        kl_clip_factor: :math:`\nu` of E7.
        kl_clip: :math:`\kappa` in force; None for no bound.
        kl: Half of :math:`\alpha^2\langle V,\nabla\bar W\rangle` before clipping, the KL of the step.
        reduction_ratio: Actual over expected change of the loss by the last reviewed step; None without one.
        predicted_decrease: Expected decrease of the loss by that step, with momentum and weight decay; None likewise.
        actual_decrease: Decrease of the loss of that step's own batch, negative for an increase; None likewise.
    """

    step: int
    damping: float
    kl_clip_factor: float
    kl: float
    kl_clip: float | None = None
    reduction_ratio: float | None = None
    predicted_decrease: float | None = None
    actual_decrease: float | None = None

    def as_metrics(self) -> dict[str, float]:
        """The numbers under the names that loggers show."""
        numbers = {
            "kfc/damping": self.damping,
            "kfc/kl_clip_factor": self.kl_clip_factor,
            "kfc/kl": self.kl,
            "kfc/kl_clip": self.kl_clip,
            "kfc/reduction_ratio": self.reduction_ratio,
            "kfc/predicted_decrease": self.predicted_decrease,
            "kfc/actual_decrease": self.actual_decrease,
        }
        return {name: value for name, value in numbers.items() if value is not None}


class History:
    """Numbers over the steps, by key, in bounded memory: what a report draws, whatever the keys are.

    A key that has reached the limit loses every second number, and takes every second one from then on.

    Args:
        limit: The largest number of numbers by key, besides the last one; even.
    """

    def __init__(self, limit: int = 400) -> None:
        self._limit = limit
        self._series: dict[str, _Series] = {}

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step, later than those before."""
        for key, number in numbers.items():
            self._series.setdefault(key, _Series()).add(step, number, self._limit)

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Steps with numbers, by key, in the order of the keys; the last number of a key is always included."""
        return {key: series.all() for key, series in self._series.items()}


@dataclass
class _Series:
    points: list[tuple[int, float]] = field(default_factory=list)
    last: tuple[int, float] | None = None
    stride: int = 1
    count: int = 0

    def add(self, step: int, number: float, limit: int) -> None:
        self.last = (step, number)
        if self.count % self.stride == 0:
            self.points.append(self.last)
        self.count += 1
        if len(self.points) > limit:
            del self.points[1::2]
            self.stride *= 2

    def all(self) -> list[tuple[int, float]]:
        missing = [] if self.last is None or self.points[-1] is self.last else [self.last]
        return [*self.points, *missing]
