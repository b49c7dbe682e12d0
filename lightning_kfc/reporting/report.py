"""Draw pictures when they are due, and write the report of a training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_kfc.kfc import KFC
from lightning_kfc.pictures import (
    draw_autocorrelation,
    draw_coverage,
    draw_factors,
    draw_numbers,
    draw_spectra,
    draw_step_time,
    png,
)
from lightning_kfc.pictures.html import render
from lightning_kfc.pictures.snapshots import SpectraOverTime, shown, shown_factors
from lightning_kfc.reporting.map_watcher import MapWatcher, spatial_modules
from lightning_kfc.reporting.measured import MeasuredNumbers
from lightning_kfc.reporting.options import Logging
from lightning_kfc.reporting.sections import run_facts, sections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The report's file in its folder.
REPORT = "report.html"


class Report:
    """Draws the pictures of one fit and writes its report, on rank zero.

    Args:
        options: The options of pictures and report.
        kfc: The engine.
        trainer: The trainer.
        module: The trained module.
    """

    def __init__(self, options: Logging, kfc: KFC, trainer: Any, module: nn.Module) -> None:
        self._options = options
        self._kfc = kfc
        self._trainer = trainer
        self._module = module
        self._active = options.draws and bool(trainer.is_global_zero)
        self._timed = self._active or bool(trainer.is_global_zero and trainer.log_every_n_steps)
        self._due_at = 0
        self._watcher: MapWatcher | None = None
        self._watched_step = -1
        self._spectra = SpectraOverTime()
        self._coverage = ""
        #: The numbers over time.
        self.measured = MeasuredNumbers(trainer, keeps=self._active)
        #: The advice in the report.
        self.advice: tuple[str, ...] = ()

    # Around a training step.

    def step_begins(self) -> None:
        """Start the clock of a batch, if numbers are logged or a report is written."""
        if self._timed:
            self._kfc.times.begin_step(next(self._module.parameters()).device)

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Record the maps of convolutions in this forward, if pictures are due and the engine takes statistics."""
        kfc = self._kfc
        # Of accumulated micro-batches, the first is enough.
        if not self._active or kfc.step < self._due_at or not kfc.batches.recorded or kfc.step == self._watched_step:
            yield
            return
        modules = spatial_modules({name: layer.adapter.module for name, layer in kfc.layers.items()})
        self._watcher, self._watched_step = MapWatcher({name: modules[name] for name in shown(modules)}), kfc.step
        self._watcher.attach()
        try:
            yield
        finally:
            self._watcher.detach()

    @contextlib.contextmanager
    def seeds(self) -> Iterator[None]:
        """Record derivatives while the engine back-propagates its seeds."""
        if self._watcher is None:
            yield
            return
        self._watcher.listening = True
        try:
            yield
        finally:
            self._watcher.listening = False

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add numbers that are logged at a step to the report."""
        # Of the layers' numbers only the median is drawn; keys of single layers have a second slash.
        drawn = {k: v for k, v in numbers.items() if not k.endswith(("_min", "_max")) and k.count("/") == 1}
        self.measured.numbers(step, drawn)

    def step_ends(self, step: int, outputs: object) -> None:
        """End the batch, and draw the pictures if they are due.

        Args:
            step: The number of this batch's step in loggers.
            outputs: The training step's return value.
        """
        if not self._timed:
            return
        kfc = self._kfc
        kfc.times.end_step()
        if not self._active:
            return
        self.measured.step_ends(step, outputs)
        done = kfc.last_step.step if kfc.last_step is not None else -1
        if done == self._watched_step and done >= self._due_at:
            self._take(done, step)

    def _take(self, done: int, step: int) -> None:
        every = self._options.pictures_every_n_steps
        # Without a period, distances grow, since changes become slower.
        self._due_at = max(1, 2 * done) if every is None else (done // every + 1) * every
        self._spectra.take(done, self._kfc.layers)
        if every is not None:
            self._send(step)

    # Pictures.

    def figures(self) -> dict[str, Figure]:
        """All pictures at present, by name."""
        kfc = self._kfc
        return {
            "numbers": draw_numbers(self.measured.moving()),
            "step_time": draw_step_time(kfc.times.mean_step()),
            "coverage": draw_coverage(str(kfc.coverage())),
            "spectra": draw_spectra(self._spectra.by_layer()),
            "autocorrelation": draw_autocorrelation(self._watcher.statistics() if self._watcher else ()),
            "factors": draw_factors(shown_factors(kfc.layers)),
        }

    def _send(self, step: int) -> None:
        figures = self.figures()
        coverage = str(self._kfc.coverage())
        if coverage == self._coverage:
            # The coverage hardly changes, so one picture is enough.
            del figures["coverage"]
        self._coverage = coverage
        for logger in self._trainer.loggers:
            add_figure = getattr(logger.experiment, "add_figure", None)
            if callable(add_figure):
                # Loggers get the numbers themselves.
                for name in (name for name in figures if name != "numbers"):
                    add_figure(f"kfc/{name}", figures[name], global_step=step)
        if self._options.report_dir is not None:
            folder = Path(self._options.report_dir) / "pictures"
            for name, figure in figures.items():
                _write(folder / f"{name}-{step:07d}.png", png(figure))

    def write(self, *, interrupted_by: BaseException | None = None) -> Path | None:
        """Write the report once, and return its path; None without a report.

        Args:
            interrupted_by: The exception that ended the training early.
        """
        if not self._active:
            return None
        self._active = False
        if self._options.report_dir is None:
            return None
        kfc = self._kfc
        if kfc.last_step is not None:
            self._spectra.take(kfc.last_step.step, kfc.layers)
        path = Path(self._options.report_dir) / REPORT
        facts = run_facts(kfc, self._trainer, interrupted_by)
        shown = sections(kfc, facts, self.figures(), self._missing(), self.measured.flat(), self.advice)
        title = f"KFC: training of {type(self._module).__name__}"
        return path if _write(path, render(title, shown).encode()) else None

    def _missing(self) -> dict[str, str]:
        """The reason for pictures without content."""
        missing = {}
        if not self.measured.history.series():
            missing["numbers"] = "No numbers were logged: see log_every_n_steps."
        elif not self.measured.moving():
            missing["numbers"] = "No number that was logged has changed."
        if self._watcher is None or not self._watcher.statistics():
            missing["autocorrelation"] = "No convolution over two dimensions was seen while statistics were taken."
        return missing


def _write(path: Path, content: bytes) -> bool:
    """Write a file completely or not at all; warn on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        warnings.warn(f"KFCCallback could not write {str(path)!r}: {error}. Training continues.", stacklevel=2)
        return False
    return True
