"""The command line of a benchmark in pieces, which continues after an interruption."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.paths import PLOTS, RESULTS


def parser_of_pieces(description: str | None, *, plots: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--pieces``, ``--results`` and, if there are plots, ``--plots``.

    Args:
        description: The description of the script, printed unchanged.
        plots: Whether the script draws.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, help="leave off after so many; the exit status is 3 while more are left")
    parser.add_argument("--results", type=Path, default=RESULTS)
    if plots:
        parser.add_argument("--plots", type=Path, default=PLOTS)
    return parser
