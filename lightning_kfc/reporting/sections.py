"""Sections of a training's report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lightning_kfc.kfc import KFC
from lightning_kfc.pictures.html import Section, as_image, as_list, as_table, as_text
from lightning_kfc.settings import CALLBACK_DEFAULTS
from lightning_kfc.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "numbers": "Numbers over time",
    "step_time": "Time of a step",
    "spectra": "Spectra of the factors",
    "autocorrelation": "Autocorrelation over space",
    "factors": "Factors",
}

#: Explanations of the pictures, by their names in logs and files.
CAPTIONS = {
    "numbers": "What was logged, at the optimizer steps where it was measured; the callback's begin with kfc/. "
    "Those that never changed are in the table below the charts.",
    "step_time": "The mean time of a step by part, warm-up included. Statistics and inverses get less of it with "
    "longer periods; the pictures themselves are not counted.",
    "coverage": "The layers with their factors, and which parameters have another form of curvature or none.",
    "spectra": "Eigenvalues of each layer's factors, from the first time (light) to the last (dark). Directions whose "
    "product of eigenvalues is far below the damping get the plain gradient.",
    "autocorrelation": "The correlation between two locations of a map, by their offset. KFC assumes derivatives to be "
    "uncorrelated: their maps should be white but for the middle. It assumes nothing of the kind of activations.",
    "factors": "The magnitude of the correlations in each factor at the last step. What is far from a diagonal is what "
    "a diagonal method misses.",
}


def sections(
    kfc: KFC,
    facts: Mapping[str, object],
    figures: Mapping[str, Figure],
    missing: Mapping[str, str],
    flat: Mapping[str, float],
    advice: Sequence[str] = (),
) -> list[Section]:
    """The whole report.

    Args:
        kfc: The engine at the end of the training.
        facts: From :func:`run_facts`.
        figures: The pictures, by name.
        missing: Sentences in the place of empty pictures, by name.
        flat: Constant logged numbers, by key.
        advice: The sentences of advice.
    """
    events = {name.replace("_", " "): count for name, count in kfc.events.state_dict().items() if count}
    drawn = {
        name: Section(title, missing[name])
        if name in missing
        else Section(title, CAPTIONS[name], as_image(figures[name], title))
        for name, title in TITLES.items()
    }
    numbers = drawn.pop("numbers")
    if flat:
        table = as_table({key: f"{value:.4g}" for key, value in flat.items()})
        numbers = replace(numbers, body=f"{numbers.body}{table}")
    planned = "" if events else "All went as planned."
    return [
        Section("Run", "", as_table(facts)),
        numbers,
        Section("Events", planned, as_table(events) if events else ""),
        Section("Advice", "" if advice else "None.", as_list(advice) if advice else ""),
        Section("Coverage", CAPTIONS["coverage"], as_text(str(kfc.coverage()))),
        *drawn.values(),
        Section("Settings", "Those that differ from their default are marked.", as_table(_settings(kfc))),
    ]


def run_facts(kfc: KFC, trainer: Any, interrupted_by: BaseException | None) -> dict[str, object]:
    """Facts about a run and its end.

    Args:
        kfc: The engine.
        trainer: The trainer.
        interrupted_by: The exception that ended the training early.
    """
    ended = "as planned" if interrupted_by is None else f"{type(interrupted_by).__name__}: {interrupted_by}"
    return {
        "Optimizer steps": 0 if kfc.last_step is None else kfc.last_step.step + 1,
        "Epochs": trainer.current_epoch,
        "Ended": ended,
        "Optimizer at the end": ", ".join(map(_described, trainer.optimizers)),
        "Rule": kfc.settings.rule,
        "Statistics from": kfc.batches.sources,
        "Ranks": trainer.world_size,
        "Versions": f"lightning-kfc {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _described(optimizer: Optimizer) -> str:
    groups = [
        f"lr={group['lr']:g}" + (f", momentum={group['momentum']:g}" if group.get("momentum") else "")
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


def _settings(kfc: KFC) -> dict[str, object]:
    settings, shown_as = kfc.given_settings, dict[str, object]()
    for entry in fields(settings):
        if entry.init:
            value, default = getattr(settings, entry.name), CALLBACK_DEFAULTS.get(entry.name, entry.default)
            shown_as[entry.name] = f"{value!r}" + ("" if value == default else "  (set)")
    return shown_as
