"""Runs every example, each in a process of its own, and fails if one fails: ``make examples``.

A new example needs nothing here if it runs without arguments, or if it is a LightningCLI program with its configuration
beside it (``name.py`` and ``name.yaml``), which is fitted. Other arguments go into ``ARGUMENTS``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: The arguments of other examples; ``{examples}`` is this folder. One that is run in several ways has several lists.
ARGUMENTS: Mapping[str, Sequence[Sequence[str]]] = {"mnist_demo.py": [("--quick",)]}
TIMEOUT_SECONDS = 300


def commands(folder: Path) -> list[list[str]]:
    """The command of every run, by file name.

    Raises:
        ValueError: If arguments are given for a file that is not there.
    """
    own = Path(__file__).name
    examples = sorted(p for p in folder.glob("*.py") if p.name != own)
    missing = ARGUMENTS.keys() - {path.name for path in examples}
    if missing:
        raise ValueError(f"ARGUMENTS names examples that are not in {folder}: {', '.join(sorted(missing))}.")
    return [
        [sys.executable, str(path), *(argument.format(examples=folder) for argument in arguments)]
        for path in examples
        for arguments in ARGUMENTS.get(path.name) or [_arguments(path)]
    ]


def _arguments(example: Path) -> Sequence[str]:
    config = example.with_suffix(".yaml")
    return ("fit", "--config", str(config)) if config.exists() else ()


def run(command: Sequence[str]) -> bool:
    """Run one example in an empty folder; show its output if it fails."""
    shown = " ".join([Path(command[1]).name, *command[2:]])
    started = time.perf_counter()
    # What an example writes goes with the folder, and relative paths into the repository would show.
    with tempfile.TemporaryDirectory() as folder:
        # One thread: the runs are tiny. utf-8: progress bars draw with it, whatever the terminal's locale.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                timeout=TIMEOUT_SECONDS,
            )
            failure, output = done.returncode and f"exit status {done.returncode}", done.stdout
        except subprocess.TimeoutExpired as error:
            failure, output = f"not done after {TIMEOUT_SECONDS} s", str(error.stdout or "")
    print(f"{'FAILED' if failure else 'ok':<7}{time.perf_counter() - started:6.1f} s  {shown}", flush=True)
    if failure:
        print(f"{output}\n{shown}: {failure}", flush=True)
    return not failure


def main() -> int:
    """The number of runs that failed."""
    started = time.perf_counter()
    # Two at a time: most of a short run is imports, on one thread.
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        succeeded = list(pool.map(run, commands(Path(__file__).resolve().parent)))
    print(f"{sum(succeeded)} of {len(succeeded)} runs ok in {time.perf_counter() - started:.1f} s", flush=True)
    return succeeded.count(False)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
