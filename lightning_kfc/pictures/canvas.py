"""Figures without a window or a global state, in one style, and their encodings."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours for colour-blind readers (Okabe & Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")

#: Text stays text and ids are the same in every run, for small files and small diffs.
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-kfc",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "legend.frameon": False,
}


def check_matplotlib(wanted_for: str) -> None:
    """Require matplotlib.

    Args:
        wanted_for: The feature that needs matplotlib, as the subject of the message.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed; the message has the command to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f"{wanted_for} draws with matplotlib, which is not installed: pip install matplotlib."
        )


@contextmanager
def style() -> Iterator[None]:
    """Draw in the package's style, without a change of the user's settings of matplotlib.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    check_matplotlib("A picture")
    import matplotlib as mpl

    settings: Any = {**mpl.rcParamsDefault, **STYLE}
    with mpl.rc_context(settings):
        yield


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels, made without pyplot, so that no window or global list refers to it.

    Args:
        rows: The number of rows of panels.
        columns: The number of columns.
        width: The width of one panel, in inches.
        height: The height of one panel, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    out = io.BytesIO()
    with style():
        figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure) -> str:
    """A figure as SVG, without date, document type or addresses other than name spaces."""
    out = io.StringIO()
    with style():
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]
