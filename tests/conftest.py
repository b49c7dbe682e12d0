"""Settings of the whole test suite."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from lightning_kfc.monitoring.messages import LOGGER
from lightning_kfc.trust_region import region
from tests.helpers import oracles
from tests.helpers.examples import FAST, USUAL

# Two test processes share two cores, and the nets are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# Compiling and the first calls of an operator take longer than hypothesis allows by default.
settings.register_profile("all", deadline=None, max_examples=USUAL, derandomize=True)
settings.register_profile("fast", settings.get_profile("all"), max_examples=FAST)
settings.load_profile("all")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", action="store_true", help="list what curvature came from, and its errors (without -n)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List the largest relative error of each test to what it expects, and what its curvature came from."""
    if config.getoption("--errors"):
        terminalreporter.section("largest relative error, test, source of the curvature")
        for test, error in sorted(oracles.ERRORS.items()):
            terminalreporter.write_line(f"{error:.1e}  {test}  {', '.join(sorted(oracles.SOURCES[test]))}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "curvature from" not in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def informed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The lines of information that the engine logs, but for the one on the source of curvature that each run has."""
    handler, level = _Lines(), LOGGER.level
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    LOGGER.setLevel(logging.INFO)
    yield handler.lines
    LOGGER.setLevel(level)


@pytest.fixture
def ten_steps_reviewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Review the first ten steps, for tests that look at each review of a short training."""
    monkeypatch.setattr(region, "REVIEWED_AT_FIRST", 10)
