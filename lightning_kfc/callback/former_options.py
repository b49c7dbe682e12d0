"""The callback's options of earlier versions, which it accepts only to name their replacements."""

from __future__ import annotations

from typing import Any, TypedDict

from lightning_kfc.settings import FORMER


# The callback takes them by name, since the command line's own error of an unknown option names no replacement.
class FormerOptions(TypedDict, total=False):  # noqa: D101 (written below)
    background_inverses: Any
    factor_examples: Any
    factor_storage: Any
    inverse_precision: Any
    inverse_tolerance: Any
    log_layers: Any
    max_overhead: Any
    pictures_every_n_steps: Any
    progress_bar: Any
    reduce_precision: Any
    report_dir: Any
    stagger_inverses: Any


FormerOptions.__doc__ = "Options of earlier versions.\n\nArgs:\n" + "\n".join(
    f"    {name}: Not accepted: {message}" for name, message in FORMER.items()
)
