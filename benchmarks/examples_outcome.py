"""The last line of each example: ``python -m benchmarks.examples_outcome``.

Each example runs in a separate process on one thread. A run is a piece; after an interruption, the command continues
with the missing pieces.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.report import measured_with
from benchmarks.paths import ROOT

FOLDER = ROOT / "examples"
#: The examples in the order of the table, with the arguments of each.
EXAMPLES: Mapping[str, Sequence[str]] = {
    "transformer": (),
    "segmentation": (),
    "regression": (),
    "gan": (),
    "implicit_picture": (),
    "ddp": (),
    "fabric_loop": (),
    "digits_cli": ("fit", "--config", str(FOLDER / "digits_cli.yaml")),
    "resume": (),
    "mnist_demo": (),
}


def measure(example: str) -> dict[str, Any]:
    """Run an example in a new process.

    Returns:
        Its last line as ``"outcome"``, and the CPU ``"seconds"`` of the whole command.

    Raises:
        RuntimeError: If it fails, with its output.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(FOLDER / f"{example}.py"), *EXAMPLES[example]],
            cwd=folder,
            env={**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
    if done.returncode:
        raise RuntimeError(f"{example} ended with status {done.returncode}:\n{done.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(done.stdout, flush=True)
    return {"outcome": done.stdout.strip().splitlines()[-1].strip(), "seconds": round(seconds, 1)}


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each example."""
    lines = ["| example | prints at the end | CPU seconds of the whole command |", "|---|---|---|"]
    lines += [f"| `{name}.py` | {entry['outcome']} | {entry['seconds']:.0f} |" for name, entry in found.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing examples, and write the table.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__, plots=False)
    parser.add_argument("--again", nargs="+", choices=EXAMPLES, default=(), help="forget these runs")
    options = parser.parse_args(arguments)
    saved: Path = options.results / "examples.json"
    found: dict[str, Any] = json.loads(saved.read_text("utf-8"))["found"] if saved.exists() else {}
    found = {name: entry for name, entry in found.items() if name not in options.again}
    missing = [name for name in EXAMPLES if name not in found]
    now = missing[: options.pieces]
    for name in now:
        print(f"==> {name}", flush=True)
        found[name] = measure(name)
        ordered = {name: found[name] for name in EXAMPLES if name in found}
        saved.write_text(json.dumps({"measured_with": measured_with(), "found": ordered}, indent=1) + "\n")
        (options.results / "examples.md").write_text(markdown(ordered) + "\n")
    return 0 if len(now) == len(missing) else 3


if __name__ == "__main__":
    raise SystemExit(main())
