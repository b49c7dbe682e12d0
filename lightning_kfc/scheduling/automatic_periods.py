"""Choose the periods that are "auto" from times of the first steps, so that the overhead keeps within a budget.

Among the pairs within the budget, the one with the youngest curvature is chosen: the mean age of an inverse in use is
T_inv / 2 steps, and its statistics are T_cov / 2 steps older.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from lightning_kfc.distributed.process_group import ProcessGroup
from lightning_kfc.monitoring.timing import PHASES, REST, StepTimes
from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule

#: The number of timed steps without statistics after the warm-up; every tenth step is reviewed.
BETWEEN = 5
#: The largest number of steps from the end of the warm-up to the choice: the default period.
ENOUGH = 20

#: A timed step: whether it took statistics, whether it refreshed all inverses, and the seconds of its parts.
Timed = tuple[bool, bool, dict[str, float]]
#: The bounds of T_cov and T_inv. With shorter periods and the default decay, running averages hold too few steps; with
#: longer ones they hold statistics of former weights.
SHORTEST, LONGEST = (5, 10), (50, 200)


@dataclass(frozen=True)
class Costs:
    """The costs of a step, in seconds.

    Attributes:
        plain: The time of a step without the callback.
        each_step: The costs of every step: preconditioning, and reviews in the mean.
        statistics: The cost to take statistics once.
        inverses: The cost to refresh all inverses once.
    """

    plain: float
    each_step: float
    statistics: float
    inverses: float

    def overhead(self, factors: int, inverses: int) -> float:
        """The mean overhead as a share of a plain step, at two periods in steps."""
        return (self.each_step + self.statistics / factors + self.inverses / inverses) / self.plain


@dataclass(frozen=True)
class Periods:
    """The chosen periods.

    Attributes:
        factors: T_cov, in steps.
        inverses: T_inv, in steps.
        overhead: The mean overhead, as a share of a plain step.
    """

    factors: int
    inverses: int
    overhead: float


def choose_periods(
    costs: Costs, max_overhead: float, factors: int | None = None, inverses: int | None = None
) -> Periods:
    """The shortest periods with an overhead within a budget, or the longest ones if there are none.

    Args:
        costs: The measured costs.
        max_overhead: The budget, as a share of a plain step.
        factors: T_cov; None to choose it.
        inverses: T_inv; None to choose it.
    """
    pairs = list(candidates(factors, inverses))
    within = [pair for pair in pairs if costs.overhead(*pair) <= max_overhead]
    best = min(within, key=lambda pair: (sum(pair), pair)) if within else max(pairs, key=lambda pair: (sum(pair), pair))
    return Periods(*best, costs.overhead(*best))


def candidates(factors: int | None = None, inverses: int | None = None) -> Iterator[tuple[int, int]]:
    """Pairs T_cov, T_inv to choose from; if both are free, T_inv is a multiple of T_cov.

    Args:
        factors: T_cov if given.
        inverses: T_inv if given.
    """
    if factors is not None and inverses is not None:
        yield factors, inverses
        return
    if inverses is not None:
        # With rarer statistics, most refreshes would not change the inverses.
        yield from ((t, inverses) for t in range(min(SHORTEST[0], inverses), min(LONGEST[0], inverses) + 1))
        return
    for t in (factors,) if factors is not None else range(SHORTEST[0], LONGEST[0] + 1):
        shortest = -(-SHORTEST[1] // t) * t
        yield from ((t, inverse) for inverse in range(shortest, max(LONGEST[1], shortest) + 1, t))


class PeriodChoice:
    """Chooses the periods once; before that, and without "auto", the first schedule is in force.

    Args:
        schedule: The schedule until periods are chosen.
        factors: The period of statistics; None to choose it.
        inverses: The period of inverses; None to choose it.
        max_overhead: The budget of the overhead, as a share of a plain step.
        times: The clock of the engine's phases, to which a second clock is attached until the choice.

    Attributes:
        chosen: The chosen periods; None before the choice.

    Raises:
        ValueError: If a period is "auto" with deterministic algorithms.
    """

    def __init__(
        self,
        schedule: RefreshSchedule,
        factors: int | None,
        inverses: int | None,
        max_overhead: float,
        times: StepTimes,
    ) -> None:
        self._automatic = factors is None or inverses is None
        if self._automatic and torch.are_deterministic_algorithms_enabled():
            raise ValueError(
                "Periods that are 'auto' depend on measured times, and contradict deterministic algorithms "
                "(Trainer(deterministic=True) or torch.use_deterministic_algorithms). Give numbers for "
                "factor_every_n_steps and inverse_every_n_steps."
            )
        self._first, self._factors, self._inverses, self._budget = schedule, factors, inverses, max_overhead
        self._times = times
        self._clock: StepTimes | None = None
        self._timed: list[Timed] = []
        self._seen: dict[str, float] = {}
        # Timed steps after the warm-up, and those without statistics.
        self._after = self._between = 0
        self.chosen: Periods | None = None

    @property
    def open(self) -> bool:
        """Whether a choice is to come."""
        return self._automatic and self.chosen is None

    @property
    def schedule(self) -> RefreshSchedule:
        """The schedule in force."""
        if self.chosen is None or not self._automatic:
            return self._first
        return replace(
            self._first,
            factor_every_n_steps=self.chosen.factors,
            inverse_every_n_steps=self.chosen.inverses,
            later_periods=1,
        )

    def step_begins(self, since: int, *, statistics: bool, device: torch.device) -> str | None:
        """Begin a step, and end the last one, before the choice. Collective: call on every rank at the same steps.

        Args:
            since: The number of the new step, counted from the start of the warm-up, at least 1.
            statistics: Whether the last step took statistics.
            device: The model's device.

        Returns:
            The choice in words, at the step that makes it; else None.
        """
        if self._clock is None:
            # The first step, with its setup, is not typical.
            self._clock = self._times.also = StepTimes()
        else:
            self._clock.end_step()
            self._note(since - 1, statistics)
        if self._enough():
            self._clock = self._times.also = None
            return self._choose(device)
        self._clock.begin_step(device)
        return None

    def _note(self, step: int, statistics: bool) -> None:
        assert self._clock is not None
        seconds, schedule = self._clock.seconds(), self._first
        parts = {name: seconds[name] - self._seen.get(name, 0.0) for name in PHASES}
        self._seen = seconds
        warm = step < schedule.warmup_steps
        self._timed.append((statistics, warm and schedule.inverses_due(step), parts))
        if warm:
            return
        self._after += 1
        self._between += not statistics

    def _enough(self) -> bool:
        known = any(all_inverted for _, all_inverted, _ in self._timed)
        return (known and self._between >= BETWEEN) or self._after >= ENOUGH

    def _choose(self, device: torch.device) -> str:
        costs = costs_of(self._timed, self._first.inverse_every_n_steps)
        own = choose_periods(costs, self._budget, self._factors, self._inverses)
        # The ranks' times differ, so all use those of rank 0.
        everyone = ProcessGroup()
        chosen = torch.tensor([own.factors, own.inverses, own.overhead], dtype=torch.float64, device=device)
        chosen = everyone.max(chosen if everyone.rank == 0 else torch.zeros_like(chosen))
        self.chosen = Periods(int(chosen[0]), int(chosen[1]), float(chosen[2]))
        self._timed.clear()
        return self._described(costs)

    def _described(self, costs: Costs) -> str:
        chosen, budget = self.chosen, self._budget
        assert chosen is not None
        found = (
            f"KFC chose factor_every_n_steps={chosen.factors} and inverse_every_n_steps={chosen.inverses}, at which a "
            f"step takes {100 * chosen.overhead:.0f}% longer"
        )
        if chosen.overhead <= budget:
            return f"{found} (timing.max_overhead={budget:g})."
        alone = costs.each_step / costs.plain
        return (
            f"{found}. This exceeds timing.max_overhead={budget:g}, although these are the longest useful periods. "
            f"Preconditioning and reviews alone take {100 * alone:.0f}%."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {
            "chosen": None
            if self.chosen is None
            else [self.chosen.factors, self.chosen.inverses, self.chosen.overhead],
            "timed": [[statistics, inverses, dict(parts)] for statistics, inverses, parts in self._timed],
            "after": [self._after, self._between],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`; empty states are those of versions without "auto"."""
        self._clock = self._times.also = None
        self._seen = {}
        chosen = state.get("chosen")
        self.chosen = None if chosen is None else Periods(int(chosen[0]), int(chosen[1]), float(chosen[2]))
        self._timed = [(bool(s), bool(i), dict(parts)) for s, i, parts in state.get("timed", [])]
        self._after, self._between = map(int, state.get("after", (0, 0)))


def costs_of(timed: Sequence[Timed], period: int) -> Costs:
    """The costs of a step's phases, as medians of timed steps, since some steps wait for something else.

    Args:
        timed: At least one step.
        period: T_inv at the time of these steps, in which all inverses are refreshed once.
    """
    between = [parts for statistics, _, parts in timed if not statistics]
    some = between or [parts for _, _, parts in timed]
    plain = max(median(parts[REST] for parts in some), 1e-9)
    # Recording makes the forward longer too, since compiled code runs eagerly.
    taken = [parts["statistics"] + max(parts[REST] - plain, 0.0) for statistics, _, parts in timed if statistics]
    full = [parts["inverses"] for _, all_inverted, parts in timed if all_inverted]
    recent = [parts["inverses"] for _, _, parts in timed[-period:]]
    return Costs(
        plain=plain,
        each_step=median(parts["preconditioning"] for parts in some) + fmean(parts["reviews"] for parts in some),
        statistics=median(taken) if taken else 0.0,
        inverses=median(full) if full else sum(recent),
    )
