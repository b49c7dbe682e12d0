"""Long trainings are watched: what stays flat passes, and what grows is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from benchmarks import soak
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(entry) for entry in QUIET), pytest.mark.slow]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def _threads_and_log_as_before() -> Iterator[None]:
    threads, log = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = log.level
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


@pytest.mark.parametrize("net", soak.NETS)
def test_nothing_grows_over_sixty_steps(net: str) -> None:
    samples, wrong = soak.soak(net, 60)
    assert samples[-1][0] == 60
    assert wrong == []


class Leak(pl.Callback):
    """Keeps each batch, and hangs a hook on the module."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(torch.zeros(1))
        pl_module.net.register_forward_hook(lambda *rest: None)


def test_what_grows_and_what_stays_attached_is_named() -> None:
    _, wrong = soak.soak("mlp", 20, Leak())
    assert any(line.startswith("the number of live tensors grew from") for line in wrong)
    assert "hooks were left attached between steps" in wrong


def test_the_table_is_that_of_ten_thousand_steps_of_each_net_and_nothing_grew() -> None:
    found = json.loads((RESULTS / "soak.json").read_text("utf-8"))["found"]
    assert list(found) == list(soak.NETS)
    assert {entry["samples"][-1][0] for entry in found.values()} == {10_000}
    assert [line for entry in found.values() for line in entry["wrong"]] == []
    assert (RESULTS / "soak.md").read_text("utf-8").strip() == soak.markdown(found)


def test_nets_are_soaked_in_pieces_and_a_failure_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = (10, 400.0, 50, 0, 1.0)
    monkeypatch.setattr(
        soak, "soak", lambda net, steps, **options: ([sample], ["a weight is not finite"] if net == "conv" else [])
    )
    folder = ["--results", str(tmp_path)]
    assert soak.main([*folder, "--pieces", "1"]) == 3
    assert soak.main(folder) == 1
    assert soak.main([*folder, "--steps", "5", "--pieces", "1"]) == 3
    assert list(json.loads((tmp_path / "soak.json").read_text())["found"]) == ["mlp"]
