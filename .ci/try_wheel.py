"""Install the wheel of a folder into an environment of its own, and run the README's first program from there.

The packages that it depends on are those of the interpreter that runs this script, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHERE = "import lightning_kfc; print(lightning_kfc.__version__, lightning_kfc.__file__)"


def readme_program() -> str:
    """The first Python block of the README."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("README.md has no Python block.")
    return found[1]


def try_wheel(wheel: Path) -> None:
    """Install a wheel, check that it is what is imported, and run the README's program."""
    # Without PYTHONPATH the sources of the checkout are out of reach.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        home = folder / "venv"
        venv.create(home, with_pip=True)
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

        def call(*arguments: str) -> str:
            command = [str(python), *arguments]
            return subprocess.run(
                command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout

        call("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", str(wheel))
        site = Path(call("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # A line of a .pth file adds a folder without reading that folder's own .pth files: no editable install.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        version, file = call("-c", WHERE).split(maxsplit=1)
        if not Path(file.strip()).is_relative_to(site):
            raise RuntimeError(f"lightning_kfc is imported from {file.strip()}, and not from the wheel.")
        if f"-{version}-" not in wheel.name:
            raise RuntimeError(f"{wheel.name} holds version {version}.")
        (folder / "program.py").write_text(readme_program(), encoding="utf-8")
        call("program.py")
    print(f"{wheel.name}: the README's program runs.")


if __name__ == "__main__":
    (built,) = Path(sys.argv[1]).resolve().glob("*.whl")
    try_wheel(built)
