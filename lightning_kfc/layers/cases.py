"""What the documentation's table of layers says of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """A line of the table: some options of a layer, and how it is treated with them.

    ``docs/generate_layer_table.py`` makes the table from the ``cases`` of all registered adapters.

    Attributes:
        options: Which options or uses of the layer.
        verdict: ``"exact"``: the rows rebuild the gradient, and there is a case in which the curvature equals the
            dense Fisher matrix; ``"approximate"``: the curvature is a rougher one; ``"plain"``: there is none, and the
            parameters keep their gradient.
        how: How, or why not, and where the curvature is exact.
        tests: The tests that show it, as ``"layers/test_conv.py::test_name"`` in ``tests/``.
    """

    options: str
    verdict: Literal["exact", "approximate", "plain"]
    how: str
    tests: tuple[str, ...] = ()
