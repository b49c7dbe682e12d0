"""Strategies that start their own processes: by spawn, and by fork as in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launched import train
from tests.distributed.nets import Net, difference, fit, images
from tests.distributed.pool import context
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]


@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_spawn"])
def test_processes_that_the_strategy_spawns_or_forks_equal_one_rank(strategy: str, tmp_path: Path) -> None:
    train_elsewhere("ddp_notebook", tmp_path) if strategy == "ddp_notebook" else train(strategy, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert difference(*ranks) == 0
    found = difference(ranks[0], fit(Net(), data=images(24), batch_size=8))
    print(f"largest relative difference: {found:.2g}")
    assert found < 1e-9


def train_elsewhere(strategy: str, folder: Path) -> None:
    """As in a notebook that has not computed yet: torch does not fork processes that have."""
    process = context().Process(target=train, args=(strategy, folder))
    process.start()
    process.join(60)
    assert process.exitcode == 0
