"""Random streams of the sampling; a resumed run draws the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch


class RandomStreams:
    """Generators that depend on seed, rank, step and micro-batch alone.

    Args:
        seed: The user's seed.
        rank: This process's rank.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._seed = seed
        self._rank = rank

    def generator(self, step: int, micro_batch: int, stream: int = 0) -> Callable[[torch.device], torch.Generator]:
        """The generator of a micro-batch, by device; streams are independent of each other."""
        mixed = 0
        for part in (self._seed, self._rank, step, micro_batch, stream):
            # The multiplier of Knuth's MMIX generator: neighbouring steps get unrelated seeds.
            mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        return lambda device: torch.Generator(device).manual_seed(mixed)
