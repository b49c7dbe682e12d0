"""DDP with the rule "adam": ranks with half a batch each keep the same moments, those of one rank with the whole."""

from __future__ import annotations

import pytest

from tests.distributed.nets import dense_net
from tests.distributed.pool import Ranks
from tests.distributed.test_ddp import compare
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]


def test_two_ranks_step_by_the_moments_of_the_whole_batch(two_ranks: Ranks) -> None:
    # Factors of full rank: in a null space the eigenbasis is arbitrary, and so is a step that treats its axes apart.
    # Along the one direction that is left (all logits alike), the rounding of no gradient is divided by Adam's 1e-8.
    kfc = {"rule": "adam", "kl_clip": 0.01}
    assert compare(two_ranks, make=dense_net, examples=480, batch_size=80, kfc=kfc) < 1e-7
