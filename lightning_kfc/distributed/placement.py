r"""The ranks that factorise and hold each layer: a pure function of the layers' costs (KAISA, Pauloski et al. 2021).

The W ranks form W/k groups of k *gradient workers*. The owner of a layer factorises it. All workers of the owner's
group get the inverse and precondition the layer's gradient, and each worker sends the result to one rank of every
other group. k = W is COMM-OPT: every rank holds every inverse, and only refreshes communicate. k = 1 is MEM-OPT: one
rank holds an inverse, and every step sends the preconditioned gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_kfc.utilities.checks import check_choice, check_positive
from lightning_kfc.utilities.load_balancing import longest_first

#: The named placements; a number is the fraction k/W of ranks that hold an inverse.
PLACEMENTS = ("auto", "comm-opt", "mem-opt")


def check_placement(placement: Any, inverse: str) -> None:
    """Require a valid placement that suits the inverse.

    Args:
        placement: The user's placement.
        inverse: The user's kind of inverse.

    Raises:
        TypeError: If the placement is neither a word nor a number.
        ValueError: If it is none of :data:`PLACEMENTS` and no fraction, or does not suit the inverse.
    """
    if isinstance(placement, str):
        check_choice("placement", placement, PLACEMENTS)
    else:
        check_positive("placement", placement)
        if placement > 1:
            raise ValueError(f"placement is a fraction of the ranks, at most 1, got {placement!r}.")
    if inverse == "ekfac" and placement not in ("auto", "comm-opt", 1):
        raise ValueError(
            f"placement={placement!r} leaves ranks without the eigenbasis on which inverse='ekfac' projects their own "
            "examples. Use placement='comm-opt', or inverse='eigh'."
        )


def gradient_workers(placement: str | float, ranks: int) -> int:
    """The number k of ranks that hold each inverse: the divisor of ``ranks`` nearest to the placement.

    Args:
        placement: ``"comm-opt"`` (all), ``"mem-opt"`` (one), or the fraction k/W.
        ranks: W.
    """
    if isinstance(placement, str):
        return ranks if placement == "comm-opt" else 1
    divisors = [k for k in range(1, ranks + 1) if ranks % k == 0]
    return min(divisors, key=lambda k: (abs(k - placement * ranks), k))


@dataclass(frozen=True)
class Grid:
    """The ranks as groups of workers.

    Attributes:
        ranks: W.
        workers: k, a divisor of W.
    """

    ranks: int
    workers: int

    def group(self, rank: int) -> int:
        """The group of a rank; neighbouring ranks, which often share a machine, are in one group."""
        return rank // self.workers

    def in_turns(self, seat: int) -> int:
        """The rank of a seat; neighbouring seats are in different groups."""
        groups = self.ranks // self.workers
        return seat % groups * self.workers + seat // groups

    def members(self, rank: int) -> tuple[int, ...]:
        """The ranks of a rank's group."""
        first = self.group(rank) * self.workers
        return tuple(range(first, first + self.workers))

    def receivers(self, rank: int) -> tuple[int, ...]:
        """The ranks, one of each group, between which a rank exchanges preconditioned gradients."""
        return tuple(range(rank % self.workers, self.ranks, self.workers))

    def source(self, owner: int, rank: int) -> int:
        """The rank that sends the gradient of an owner's layer to a rank; the rank itself if it holds the inverse."""
        return self.group(owner) * self.workers + rank % self.workers

    def holds(self, owner: int, rank: int) -> bool:
        """Whether a rank holds the inverses of an owner's layers."""
        return self.group(owner) == self.group(rank)


@dataclass
class Placement:
    """The owner of each layer; later layers are added to the ranks with the least load.

    Attributes:
        grid: The ranks.
        owners: The owner, by layer.
    """

    grid: Grid
    owners: dict[str, int] = field(default_factory=dict)
    _loads: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with loads of zero."""
        self._loads = [0.0] * self.grid.ranks

    def add(self, costs: Mapping[str, float]) -> None:
        """Assign owners to layers without one."""
        new = {name: cost for name, cost in costs.items() if name not in self.owners}
        # In turns from all groups, so that no group holds all of few layers.
        seats = longest_first(new, self.grid.ranks, self._loads)
        self.owners |= {name: self.grid.in_turns(seat) for name, seat in seats.items()}
