"""Writes the table of versions into ``compatibility.md``.

    python docs/generate_versions_table.py

The lowest versions are those of ``constraints-oldest.txt``, the highest those of ``constraints-newest.txt``, and the
Pythons those of ``pyproject.toml``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from generated_tables import page_with

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
#: Rows, by package; the two packages of Lightning have the same versions.
ROWS = {
    "torch": "torch",
    "lightning": "lightning, pytorch-lightning",
    "torchmetrics": "torchmetrics",
    "jsonargparse": "jsonargparse, for the command line",
    "matplotlib": "matplotlib, for pictures and reports",
    "tensorboard": "tensorboard",
}


def pins(name: str) -> dict[str, str]:
    """The versions of a constraints file, by package."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def pythons() -> list[str]:
    """The versions of Python that the package's classifiers name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    last = (classifier.rpartition(" ")[2] for classifier in project["classifiers"])
    return [version for version in last if version.startswith("3.")]


def table() -> str:
    """The table.

    Raises:
        ValueError: If the two packages of Lightning are pinned to different versions.
    """
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints-newest.txt")
    for found in (oldest, newest):
        if found["lightning"] != found["pytorch-lightning"]:
            raise ValueError(f"lightning is pinned to {found['lightning']}, the other to {found['pytorch-lightning']}.")
    lines = ["| what | lowest, tested | highest, tested |", "|---|---|---|"]
    lines.append(f"| Python | {pythons()[0]} | {pythons()[-1]} |")
    lines += [f"| {title} | {oldest[name]} | {newest[name]} |" for name, title in ROWS.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table of today."""
    return page_with(table(), PAGE, __file__)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
