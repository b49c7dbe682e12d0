"""On two ranks, too, a training step leaves behind what it leaves without the callback, and as many collectives."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist

from lightning_kfc import KFCCallback
from tests.distributed.pool import Ranks
from tests.helpers.impure_steps import ROWS, Batches, Impure
from tests.helpers.visible import Seen, train

pytestmark = pytest.mark.slow

BATCHES = 15
KINDS = [
    "AddsToBuffers",
    "CarriesAHiddenState",
    "ChangesABatchInNestedDict",
    "ConsumesAGenerator",
    "CountsInPrivateAttributes",
    "DrawsFromItsOwnNumpyGenerator",
    "DrawsFromTheGlobalStreams",
    "FillsCounters",
    "GathersCounts",
    "KeepsAContrastiveQueue",
    "LogsValues",
    "NormalisesByBatches",
    "QuantisesByACodebook",
    "ReducesInItsOwnGroup",
    "Teaching",
    "UpdatesBootStrapper",
    "WritesFiles",
]
#: Those that speak with the other rank.
TALKATIVE = ["GathersCounts", "ReducesInItsOwnGroup"]


def differences_on_a_rank(kinds: list[str], rows_more: int) -> dict[str, list[str]]:
    """The differences between trainings with and without the callback, with larger batches on rank 1."""
    rank = dist.get_rank()

    def seen(kind: str, folder: Path, *callbacks: KFCCallback, lead: Seen | None = None) -> Seen:
        return train(
            Impure.kinds[kind],
            partial(Batches, count=BATCHES, rows=ROWS + rows_more * rank),
            folder,
            callbacks,
            lead=lead,
            seed=rank,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
        )

    found = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            ours = seen(kind, Path(folder) / "with", KFCCallback(average_weights=None))
            plain = seen(kind, Path(folder) / "without", lead=ours)
        found[kind] = ours.differences(plain, Impure.kinds[kind].rounding)
    return found


@pytest.mark.parametrize("rows_more", [0, 140], ids=["equal batches", "unequal batches"])
def test_every_step_leaves_behind_on_each_rank_what_it_leaves_without_the_callback(
    two_ranks: Ranks, rows_more: int
) -> None:
    kinds = TALKATIVE if rows_more else KINDS
    ranks = two_ranks.run(differences_on_a_rank, kinds, rows_more)
    found = [
        f"rank {rank}, {kind}: {line}"
        for rank, differences in enumerate(ranks)
        for kind in kinds
        for line in differences[kind][:1]
    ]
    assert not found, "\n".join(found)
