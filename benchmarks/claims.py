"""The README's table of claims, from the results of both contests.

``python -m benchmarks.claims`` writes it into ``results/claims.md``, which the documentation includes, and into the
README.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.away.contest import HOME as HOME_TASKS
from benchmarks.away.contest import record_file
from benchmarks.away.records import Record
from benchmarks.away.tasks import AWAY
from benchmarks.contest.report import time_cell
from benchmarks.contest.tasks import Task
from benchmarks.paths import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- claims: python -m benchmarks.claims -->\n", "<!-- end of claims -->\n"
#: Columns, by contestant.
SHOWN = {"adam": "Adam", "muon": "Muon", "soap": "SOAP", "kfc": "KFC"}
#: The callback's default average; the peers' averages are tuned.
OWN_AVERAGE = "0.9"
#: Rows, by task; a task of the contest has one row for each of its batch sizes.
HOME = {
    "conv": "conv net",
    "autoencoder": "deep autoencoder",
    "conv_autoencoder": "conv autoencoder",
    "resnet": "ResNet-20",
    "vit": "vision transformer",
    "language_model": "language model",
}
ELSEWHERE = {
    "signals": "1-D convolutions",
    "separable": "depthwise-separable net",
    "table_classification": "table, classes",
    "picture": "picture from coordinates",
    "forecast": "forecasting transformer",
    "vae": "variational autoencoder",
    "table_regression": "table, regression",
    "gru": "GRU",
    "diffusion": "diffusion U-Net",
    "segmentation": "segmentation",
    "sharpening": "sharpening",
    "contrastive": "contrastive",
}

#: Iterations and CPU seconds to the target, infinite if never; None if not measured.
Reached = Mapping[str, tuple[float, float] | None]


def reached(record: Record) -> Reached:
    """Medians of the shown contestants, each with its average of weights."""
    seeds = sorted(set.intersection(*({int(seed) for seed in e.runs} for e in record.entries.values())))
    found: dict[str, tuple[float, float] | None] = {}
    for name in SHOWN:
        entry = record.entries.get(name)
        average = OWN_AVERAGE if name == "kfc" else entry.average if entry is not None else None
        found[name] = entry.medians(average, seeds) if entry is not None and average is not None and seeds else None
    return found


def row(title: str, batch_size: int, found: Reached) -> str:
    """A line of the table; the least time is bold."""
    cells = [f"{title}, batch {batch_size:,}"]
    least = min((value[1] for value in found.values() if value is not None), default=math.inf)
    cells += [time_cell(value, least, "never") for value in found.values()]
    return "| " + " | ".join(cells) + " |"


def rows(titles: Mapping[str, str], tasks: Mapping[str, Task], folder: Path) -> Iterator[str]:
    """The measured ones of these tasks."""
    for task in tasks.values():
        path = record_file(folder, task)
        if path.exists():
            record = Record.load(path)
            yield row(titles[task.name], record.batch_size, reached(record))


def claims(folder: Path = RESULTS) -> str:
    """The table, from the records of a folder."""
    heads = ["", *SHOWN.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [_section("**At home** (some of these tasks chose the defaults)"), *rows(HOME, HOME_TASKS, folder)]
    lines += [_section("**Away from home**"), *rows(ELSEWHERE, AWAY, folder)]
    return "\n".join(lines) + "\n"


def _section(title: str) -> str:
    return f"| {title} |" + " |" * len(SHOWN)


def with_claims(text: str, table: str) -> str:
    """A page with the table between its marks.

    Raises:
        ValueError: If the page lacks a mark.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The page lacks {BEGIN.strip()!r} or {END.strip()!r}: put both where the table belongs.")
    return before + begin + "\n" + table + "\n" + end + after


def main(folder: Path = RESULTS, pages: Sequence[Path] = (README,)) -> None:
    """Write the table."""
    table = claims(folder)
    (folder / "claims.md").write_text(table, "utf-8")
    for page in pages:
        page.write_text(with_claims(page.read_text("utf-8"), table), "utf-8")


if __name__ == "__main__":
    main()
