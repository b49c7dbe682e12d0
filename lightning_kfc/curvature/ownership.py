"""The ranks that hold the factors and the inverse of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch import distributed as dist

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed.placement import Grid, Placement, gradient_workers
from lightning_kfc.distributed.process_group import Communication, ProcessGroup, is_sharded
from lightning_kfc.factors.inverses import Inverse


class LayerOwnership:
    """Assigns factors and inverses of layers to ranks, and sends them; with one rank, nothing is sent.

    Args:
        group: The ranks between which the batch is split.
        placement: ``"comm-opt"``, ``"mem-opt"``, the fraction of ranks that hold each inverse, or ``"auto"``:
            MEM-OPT if parameters are sharded and the inverse allows it, else COMM-OPT.
        inverse: The user's kind of inverse.
        layers: All layers, which may change.
        communication: Counts bytes.
    """

    def __init__(
        self,
        group: ProcessGroup,
        placement: str | float,
        inverse: type[Inverse],
        layers: Mapping[str, Layer],
        communication: Communication,
    ) -> None:
        #: The ranks between which the batch is split.
        self.group = group
        # Every rank needs the basis, on which it projects its own examples.
        self._requested = "comm-opt" if placement == "auto" and inverse.wants_examples else placement
        self._layers = layers
        self.communication = communication
        self._placement: Placement | None = None
        self._groups: dict[tuple[int, ...], Any] = {}

    # Owners.

    @property
    def placement(self) -> Placement:
        """The placement on this run's ranks, made at its first use, when all ranks have started."""
        if self._placement is None or self._placement.grid.ranks != self.group.size:
            requested = self._requested
            if requested == "auto":
                parameters = [p for layer in self._layers.values() for p in layer.parameters()]
                requested = "mem-opt" if any(map(is_sharded, parameters)) else "comm-opt"
            self._placement = Placement(Grid(self.group.size, gradient_workers(requested, self.group.size)))
            self._groups.clear()
        return self._placement

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all factors and inverses."""
        return self.placement.grid.workers == self.group.size

    def owner(self, layer: Layer) -> int | None:
        """The only rank of the group that holds a layer's factors; None if all do."""
        if self.replicated:
            return None
        placement = self.placement
        if layer.name not in placement.owners:
            placement.add({name: other.cost() for name, other in self._layers.items()})
            placement.add({layer.name: layer.cost()})
        return placement.owners[layer.name]

    def follow(self, kept: Mapping[str, str]) -> None:
        """Keep the owners of remaining layers, given their present names by their former names."""
        if self._placement is not None:
            owners = self._placement.owners
            self._placement.owners = {kept[name]: owner for name, owner in owners.items() if name in kept}

    def has_factors(self, layer: Layer) -> bool:
        """Whether this rank holds a layer's factors."""
        return self.owner(layer) in (None, self.group.rank)

    def has_inverse(self, layer: Layer) -> bool:
        """Whether this rank holds a layer's inverse."""
        owner = self.owner(layer)
        return owner is None or self.placement.grid.holds(owner, self.group.rank)

    def sum(self, own: float) -> float:
        """The sum of a number over the ranks that hold factors. Collective: call on every rank."""
        if self.replicated:
            return own
        return self.group.sum([own], next(iter(self._layers.values())).device)[0]

    # State.

    def collected(self, states: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Collect the states of all layers on the group's first rank; the others return their own.

        Collective: call on every rank. One layer is sent at a time, into the memory of the CPU, so that no device needs
        memory for all.
        """
        if self.replicated:
            return dict(states)
        result = {}
        for name, state in states.items():
            owner = self.owner(self._layers[name]) or 0
            if owner != 0 and self.group.rank == owner:
                dist.send_object_list([_on_cpu(state)], self.group.global_rank(0), group=self.group.group)
            if owner != 0 and self.group.rank == 0:
                received: list[Any] = [None]
                dist.recv_object_list(received, self.group.global_rank(owner), group=self.group.group)
                state = received[0]
            result[name] = state
        return result

    # Messages.

    def broadcast(self, flat: Tensor, source: int, ranks: tuple[int, ...], what: str) -> Callable[[], None]:
        """Begin to send a buffer from one rank to some; return a function that waits for it.

        Args:
            flat: The buffer, filled on the source.
            source: The rank that sends.
            ranks: All participants, including the source.
            what: The kind of message, for the count of bytes.
        """
        if len(ranks) == 1:
            return lambda: None
        self.communication.add(what, flat.nbytes)
        group = self._subgroup(ranks)
        work = dist.broadcast(flat, self.group.global_rank(source), group=group, async_op=True)
        return lambda: work.wait()

    def _subgroup(self, ranks: tuple[int, ...]) -> Any:
        if len(ranks) == self.group.size:
            return self.group.group
        if ranks not in self._groups:
            everyone = [self.group.global_rank(rank) for rank in ranks]
            # Local: ranks of other tensor-parallel positions make their own group.
            self._groups[ranks] = dist.new_group(everyone, use_local_synchronization=True)
        return self._groups[ranks]


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state
