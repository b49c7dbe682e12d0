"""Options of logging, pictures and the report."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_kfc.pictures import check_matplotlib
from lightning_kfc.utilities.checks import check_flag, check_folder, check_integer


@dataclass(frozen=True)
class Logging:
    """Contents of loggers, progress bar and report of a training.

    Args:
        layers: Whether loggers get all numbers, including those of each layer, instead of ten numbers.
        progress_bar: Whether the progress bar shows the factor of the KL clip, and the damping.
        pictures_every_n_steps: The period in optimizer steps at which pictures of the curvature go to loggers with
            figures, such as TensorBoardLogger, and to `report_dir`; null for none. Needs the extra "pictures".
        report_dir: A folder for the report of the training, one HTML file, written at its end; null for none. Needs
            the extra "pictures".

    Raises:
        ModuleNotFoundError: If pictures or a report are given and matplotlib is not installed.
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of range.
    """

    layers: bool = False
    progress_bar: bool = False
    pictures_every_n_steps: int | None = None
    report_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_flag("logging.layers", self.layers)
        check_flag("logging.progress_bar", self.progress_bar)
        if self.pictures_every_n_steps is not None:
            check_integer("logging.pictures_every_n_steps", self.pictures_every_n_steps, minimum=1)
            check_matplotlib("Logging(pictures_every_n_steps=...)")
        if self.report_dir is not None:
            object.__setattr__(self, "report_dir", check_folder("logging.report_dir", self.report_dir))
            check_matplotlib("Logging(report_dir=...)")

    @property
    def draws(self) -> bool:
        """Whether there are pictures or a report."""
        return self.pictures_every_n_steps is not None or self.report_dir is not None
