"""Pictures of a training: pure functions from numbers to a matplotlib figure.

They need matplotlib: ``pip install matplotlib``.
"""

from lightning_kfc.pictures.canvas import check_matplotlib, png, svg
from lightning_kfc.pictures.draw import (
    draw_autocorrelation,
    draw_coverage,
    draw_factors,
    draw_numbers,
    draw_spectra,
    draw_step_time,
)

__all__ = [
    "check_matplotlib",
    "draw_autocorrelation",
    "draw_coverage",
    "draw_factors",
    "draw_numbers",
    "draw_spectra",
    "draw_step_time",
    "png",
    "svg",
]
