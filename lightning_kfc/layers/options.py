"""Options of a module's statistics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterOptions:
    """The options of one module's statistics.

    Attributes:
        name: The module's name in the model, for messages.
        weight_sharing: ``"expand"``: one row per use of the weight; ``"reduce"``: one row per example.
        batch_axis: The axis of the examples in inputs with several leading dimensions.
        max_factor_dim: Above this many dimensions a factor is held as its diagonal; None for no bound, nor one by cost.
        rows_per_dim: The number of used rows of a batch, as a multiple of a factor's dimensions; None for all rows.
        every: The periods of statistics and inverses in steps, on which a layer's cost depends.
    """

    name: str = ""
    weight_sharing: str = "expand"
    batch_axis: int = 0
    max_factor_dim: int | None = None
    rows_per_dim: int | None = None
    every: tuple[int, int] = (10, 20)
