"""Writes the tutorials as executed notebooks into ``notebooks/``.

    python docs/generate_notebooks.py

The cells are the paragraphs and Python blocks of the pages; the outputs are what the blocks print when they run.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
NOTEBOOKS = DOCS / "notebooks"
PAGES = ("tutorial_classify", "tutorial_layer", "tutorial_ranks")
#: A Python block, with the mark before it and the printed text after it, where it has them.
_BLOCK = re.compile(
    r"^(?P<prints><!-- prints -->\n)?```python\n(?P<code>.*?)^```\n(?(prints)\n```text\n.*?^```\n)",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([\w/]+)\.(md|ipynb)[^)]*\)")
_DOWNLOAD = re.compile(r"^.*\{download\}.*\n\n?", re.MULTILINE)


def _named(link: re.Match[str]) -> str:
    """The text of a link within the documentation, or the title of its page."""
    if link[1]:
        return link[1]
    title = (DOCS / f"{link[2]}.md").read_text("utf-8").partition("\n")[0]
    return f"*{title.removeprefix('# ')}*"


def cells(name: str) -> list[tuple[str, str]]:
    """The cells of a page: each its kind, ``"markdown"`` or ``"code"``, and its source."""
    text = _DOWNLOAD.sub("", (DOCS / f"{name}.md").read_text("utf-8"))
    found, end = [], 0
    for block in _BLOCK.finditer(text):
        found += [("markdown", text[end : block.start()]), ("code", block["code"])]
        end = block.end()
    found.append(("markdown", text[end:]))
    named = [(kind, _LINK.sub(_named, source) if kind == "markdown" else source) for kind, source in found]
    return [(kind, source.strip("\n")) for kind, source in named if source.strip()]


def run(name: str) -> list[str]:
    """What each Python block of a page prints, run from top to bottom."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, source in cells(name):
            if kind == "code":
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(source, f"{name}.md", "exec"), namespace)
                outputs.append(printed.getvalue())
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def notebook(name: str, outputs: list[str]) -> dict[str, Any]:
    """A page as a notebook of format 4.5.

    Args:
        name: The page, without its suffix.
        outputs: What its Python blocks print.
    """
    made: list[dict[str, Any]] = []
    printed = iter(outputs)
    for number, (kind, source) in enumerate(cells(name)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(source)}
        if kind == "code":
            text = next(printed)
            shown = [{"name": "stdout", "output_type": "stream", "text": _lines(text)}] if text else []
            count = sum(other["cell_type"] == "code" for other in made) + 1
            cell |= {"execution_count": count, "outputs": shown}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write() -> None:
    """Run all tutorials and write their notebooks."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for name in PAGES:
        made = json.dumps(notebook(name, run(name)), indent=1, ensure_ascii=False)
        (NOTEBOOKS / f"{name}.ipynb").write_text(made + "\n", "utf-8")


if __name__ == "__main__":
    write()
