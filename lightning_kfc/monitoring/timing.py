"""The time of a step by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

#: The phases of a step, in the order of display; the last one is all time outside KFC.
PHASES = ("statistics", "inverses", "preconditioning", "reviews", "forward, backward and the rest")
REST = PHASES[-1]

#: Waiting intervals before the marks on the device are read, since each read waits for the device.
WAITING = 4096

Mark = float | torch.cuda.Event


@dataclass
class StepTimes:
    """Adds up the time of steps by phase, between :meth:`begin_step` and :meth:`end_step`.

    A phase inside another one does not count for the outer one. On a CUDA device the time is that of the device,
    measured by events in its stream.

    Attributes:
        steps: The number of ended steps.
        also: Another clock, with its own steps, that times the same phases.
    """

    steps: int = 0
    also: StepTimes | None = None
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _running: list[str] = field(default_factory=list)
    _since: Mark = 0.0
    _waiting: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    _on_cuda: bool = False

    def begin_step(self, device: torch.device) -> None:
        """Begin a step; the rest of one that an exception ended is not counted."""
        self._on_cuda = device.type == "cuda"
        self._running = [REST]
        self._since = self._mark()

    def end_step(self) -> None:
        """End the step."""
        if self._running:
            self._close_interval()
            self._running = []
            self.steps += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside this context for a phase of the step."""
        if self.also is None:
            with self._own_phase(name):
                yield
        else:
            with self.also.phase(name), self._own_phase(name):
                yield

    @contextlib.contextmanager
    def _own_phase(self, name: str) -> Iterator[None]:
        if not self._running:
            yield
            return
        depth = len(self._running)
        self._close_interval()
        self._running.append(name)
        try:
            yield
        finally:
            # False in a new step, after an exception that was caught far outside.
            if len(self._running) > depth:
                self._close_interval()
                del self._running[depth:]

    def seconds(self) -> dict[str, float]:
        """All seconds, by phase."""
        self._read()
        return dict(self._seconds)

    def mean_step(self) -> dict[str, float]:
        """Seconds per step, by phase; empty before the end of the first step."""
        self._read()
        return {name: seconds / self.steps for name, seconds in self._seconds.items()} if self.steps else {}

    def _mark(self) -> Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        event.record()
        return event

    def _close_interval(self) -> None:
        now = self._mark()
        self._waiting.append((self._running[-1], self._since, now))
        self._since = now
        if len(self._waiting) >= WAITING:
            self._read()

    def _read(self) -> None:
        for name, start, end in self._waiting:
            if isinstance(start, float) or isinstance(end, float):
                assert isinstance(start, float)
                assert isinstance(end, float)
                self._seconds[name] += end - start
            else:
                end.synchronize()
                self._seconds[name] += start.elapsed_time(end) / 1e3
        self._waiting.clear()
