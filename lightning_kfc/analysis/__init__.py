"""Measure KFC's approximations on a small network and a batch; ``python -m lightning_kfc.analysis`` is a demo."""

from lightning_kfc.analysis.assumptions import Assumption
from lightning_kfc.analysis.compare import compare_curvature
from lightning_kfc.analysis.plots import draw_block_spectra, draw_errors
from lightning_kfc.analysis.results import Approximation, Comparison, LayerComparison
from lightning_kfc.analysis.space import SpatialReport, spatial_statistics
from lightning_kfc.monitoring.spatial import SpatialStatistics

__all__ = [
    "Approximation",
    "Assumption",
    "Comparison",
    "LayerComparison",
    "SpatialReport",
    "SpatialStatistics",
    "compare_curvature",
    "draw_block_spectra",
    "draw_errors",
    "spatial_statistics",
]
