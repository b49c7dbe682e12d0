"""The tests on every Python that is supported, and with the oldest and the newest torch and lightning: ``nox``.

``nox -s tests-3.12 -- tests/test_kfc.py`` passes what follows ``--`` to pytest.
"""

from __future__ import annotations

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: The lowest versions that ``pyproject.toml`` admits.
LOWEST = ("torch==2.6.0", "lightning==2.5.0", "pytorch-lightning==2.5.0", "torchmetrics==1.0.0")

nox.options.sessions = ["tests", "lowest", "newest"]
nox.options.error_on_missing_interpreters = False


def run_pytest(session: nox.Session) -> None:
    """Run the tests with one thread a worker."""
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, with what pip chooses for this Python."""
    session.install("-e", ".[dev]")
    run_pytest(session)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The tests with the lowest torch and lightning, on the lowest Python."""
    session.install("-e", ".[dev]", *LOWEST)
    run_pytest(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The tests with the newest torch and lightning, release candidates included, on the newest Python."""
    session.install("-e", ".[dev]")
    session.install("--upgrade", "--pre", "torch", "lightning", "pytorch-lightning", "torchmetrics")
    run_pytest(session)
