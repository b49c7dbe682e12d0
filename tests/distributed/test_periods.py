"""Periods chosen by time are those of the first rank on all of them."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist

import lightning_kfc.scheduling.automatic_periods as period_choice
from lightning_kfc import KFCCallback
from lightning_kfc.scheduling.automatic_periods import LONGEST, SHORTEST, Costs
from tests.distributed.nets import EXACT, Net, difference, images, loader, outcome, trainer
from tests.distributed.pool import Ranks
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]


def train() -> tuple[tuple[int, int], dict[str, Tensor]]:
    auto = {"factor_every_n_steps": "auto", "inverse_every_n_steps": "auto", "warmup_steps": 4}
    callback, module = KFCCallback(**{**EXACT, **auto}), Net()
    measured = period_choice.costs_of
    # Everything is cheap on the first rank, and nothing on the other.
    period_choice.costs_of = lambda *_: Costs(1.0, 0.0, *[1e-3 if dist.get_rank() == 0 else 1e3] * 2)
    try:
        ddp = DDPStrategy(process_group_backend="gloo")
        trainer(callback, strategy=ddp, devices=2).fit(module, loader(images(8 * 24), 4))
    finally:
        period_choice.costs_of = measured
    schedule = callback.kfc.schedule
    return (schedule.factor_every_n_steps, schedule.inverse_every_n_steps), outcome(module, callback)


def test_all_ranks_follow_the_choice_of_the_first(two_ranks: Ranks) -> None:
    (periods, first), (others, second) = two_ranks.run(train)
    assert periods == others == SHORTEST != LONGEST
    assert difference(first, second) == 0
