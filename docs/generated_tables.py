"""The part of a page that a script of this folder writes."""

from __future__ import annotations

from pathlib import Path

END = "<!-- End of the table. -->\n"


def page_with(table: str, page: Path, script: str) -> str:
    """The page with a table between the lines that name its script."""
    begin = f"<!-- Made by {Path(script).name}; do not edit. -->\n"
    before, _, rest = page.read_text("utf-8").partition(begin)
    return f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}"
