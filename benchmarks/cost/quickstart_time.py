"""The time of the quickstart: ``python -m benchmarks.cost.quickstart_time``.

The page is followed to the letter: a new clone of this repository in an empty folder, the commands of step 1 in a new
environment without a cache of packages, the Python code of steps 2 to 5 in ``first_run.py``, and the command of step 3.
The time for reading and copying is not included; most of the installation is the download of torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paths import RESULTS, ROOT

PAGE = ROOT / "docs" / "quickstart.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(page: str) -> tuple[str, str, str]:
    """The page's commands for the installation, its Python file, and its command to run the file.

    Args:
        page: The page's text. Its steps are the sections whose headings begin with a number; blocks of step 1 marked
            ``console`` install, those of other steps run, and all blocks marked ``python`` are the file.
    """
    sections = {int(number): text for number, text in re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", page, re.M | re.S)}
    install = "".join(code for language, code in FENCE.findall(sections.pop(1)) if language == "console")
    blocks = [block for _, text in sorted(sections.items()) for block in FENCE.findall(text)]
    program = "\n\n".join(code for language, code in blocks if language == "python")
    run = "".join(code for language, code in blocks if language == "console")
    return install, program, run


def timed(commands: str, folder: Path) -> tuple[float, str]:
    """Seconds of commands in a shell, and their output.

    Raises:
        RuntimeError: If a command fails, with its output.
    """
    # "python" is this script's interpreter; nothing else of its environment is visible.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    started = time.perf_counter()
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env={**environment, "PATH": path, "PIP_NO_CACHE_DIR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{commands!r} ended with status {done.returncode}:\n{done.stdout}")
    print(done.stdout, flush=True)
    return seconds, done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Follow the page, and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    install, program, run = steps(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cloning, _ = timed(f"git clone --quiet '{ROOT}' lightning-kfc", folder)
        installing, _ = timed(install, folder)
        (folder / "first_run.py").write_text(program, encoding="utf-8")
        activate = next(line for line in install.splitlines() if "activate" in line)
        (first, _), (second, _) = (timed(f"{activate}\n{run}", folder) for _ in range(2))
        _, torch = timed(f"{activate}\npython -c 'import torch; print(torch.__version__)'", folder)
    machine = f"a machine of {os.cpu_count()} cores ({platform.system()}, Python {platform.python_version()})"
    text = (
        f"Followed by a script on {machine}: {cloning + installing:.0f} seconds to clone and install, most of them for "
        f"torch {torch.strip()}; {first:.0f} seconds for the first run of `first_run.py`, {second:.0f} for the next. "
        "Reading and copying come on top."
    )
    (options.results / "quickstart.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
