"""Options of a module's statistics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterOptions:
    """How the statistics of one module are taken.

    Attributes:
        name: The module's name in the model, for messages.
        weight_sharing: ``"expand"``: one row per use of the weight; ``"reduce"``: one row per example.
        batch_axis: The axis of the examples in inputs with several leading dimensions.
        max_factor_dim: Above this many dimensions a factor is held as its diagonal; None for no bound, by cost neither.
        rows_per_dim: Statistics are taken from a part of a batch's rows that has so many times a factor's dimensions;
            None for all rows.
        every: Statistics are taken, and inverses refreshed, every so many steps: what a layer costs goes by that.
    """

    name: str = ""
    weight_sharing: str = "expand"
    batch_axis: int = 0
    max_factor_dim: int | None = None
    rows_per_dim: int | None = None
    every: tuple[int, int] = (10, 20)
