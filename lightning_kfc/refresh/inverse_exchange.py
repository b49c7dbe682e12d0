"""Brings inverses, or the updates made with them, from the ranks that have them to those that need them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed.placement import Grid, Placement, factorisation_cost, gradient_workers, longest_first
from lightning_kfc.distributed.process_group import Communication, Team, is_sharded
from lightning_kfc.distributed.remote import Elsewhere, Solved
from lightning_kfc.factors.inverse import FactorisationError, Inverse
from lightning_kfc.factors.packing import Shape, pack, packed_numel, unpack
from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.monitoring.messages import inform
from lightning_kfc.rules.base import Ready, solve

#: Seconds that first inverses take before a line is logged; each later line comes after twice the time.
PATIENCE = 2.0
#: The result of a layer's refresh.
Outcome = Inverse | FactorisationError

#: What became of a layer's update on the ranks that hold its inverse.
USABLE, RESTORED, FAILED = 0.0, 1.0, 2.0


class Exchange:
    """Knows which rank holds what, and moves it; with one rank, nothing moves.

    Args:
        team: The ranks between which the batch is split.
        placement: ``"comm-opt"``, ``"mem-opt"``, the fraction of ranks that hold each inverse, or ``"auto"``:
            MEM-OPT where parameters are sharded and the inverse allows it, else COMM-OPT.
        inverse: The user's kind of inverse.
        layers: All layers; others may come and go.
        communication: Counts bytes.
    """

    def __init__(
        self,
        team: Team,
        placement: str | float,
        inverse: type[Inverse],
        layers: Mapping[str, Layer],
        communication: Communication,
    ) -> None:
        self._team = team
        # Every rank projects its own examples, for which it needs the basis.
        self._asked = "comm-opt" if placement == "auto" and inverse.wants_examples else placement
        self._layers = layers
        self.communication = communication
        self._placement: Placement | None = None
        self._groups: dict[tuple[int, ...], Any] = {}
        self._any_refreshed = False

    # Who holds what.

    @property
    def placement(self) -> Placement:
        """The placement of this run's ranks; made when first asked for, when all of them are there."""
        if self._placement is None or self._placement.grid.ranks != self._team.size:
            asked = self._asked
            if asked == "auto":
                parameters = [p for layer in self._layers.values() for p in layer.parameters()]
                asked = "mem-opt" if any(map(is_sharded, parameters)) else "comm-opt"
            self._placement = Placement(Grid(self._team.size, gradient_workers(asked, self._team.size)))
            self._groups.clear()
        return self._placement

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all factors and inverses."""
        return self.placement.grid.workers == self._team.size

    def owner(self, layer: Layer) -> int | None:
        """The only rank of the team that holds a layer's factors; None where all do."""
        if self.replicated:
            return None
        placement = self.placement
        if layer.name not in placement.owners:
            placement.add({name: factorisation_cost(_shapes(other)) for name, other in self._layers.items()})
            placement.add({layer.name: factorisation_cost(_shapes(layer))})
        return placement.owners[layer.name]

    def follow(self, kept: Mapping[str, str]) -> None:
        """Keep the owners of layers that stay, whose present names are given by those that they had."""
        if self._placement is not None:
            owners = self._placement.owners
            self._placement.owners = {kept[name]: owner for name, owner in owners.items() if name in kept}

    def has_factors(self, layer: Layer) -> bool:
        """Whether this rank holds a layer's factors."""
        return self.owner(layer) in (None, self._team.rank)

    def has_inverse(self, layer: Layer) -> bool:
        """Whether this rank holds a layer's inverse."""
        owner = self.owner(layer)
        return owner is None or self.placement.grid.holds(owner, self._team.rank)

    def total(self, own: float) -> float:
        """What the ranks find together, each for the layers whose factors it holds; every rank must ask."""
        if self.replicated:
            return own
        device = next(iter(self._layers.values())).parameters()[0].device
        return self._team.total([own], device)[0]

    # Inverses.

    def _inverters(self, layers: Sequence[Layer]) -> dict[str, int]:
        """The rank that makes each layer's inverse, given the layers that are due together; the same on every rank."""
        if self.replicated:
            # What is due together is spread over all ranks, whatever else they own.
            return longest_first({e.name: factorisation_cost(_shapes(e)) for e in layers}, self._team.size)
        return {layer.name: self.owner(layer) or 0 for layer in layers}

    def refreshed(
        self,
        layers: Sequence[Layer],
        factorise: Callable[[Layer], Inverse],
        kinds: Callable[[Layer], type[Inverse]],
    ) -> dict[str, Outcome]:
        """New inverses of layers, each factorised by one rank.

        Args:
            layers: The layers that are due, the same on every rank.
            factorise: Makes a layer's inverse; called on its owner.
            kinds: The kind of a layer's inverse.

        Returns:
            By layer: the inverse, one that says that another rank has it, or why there is none.
        """
        outcome: dict[str, Outcome] = {}
        owners = self._inverters(layers)
        own = [layer for layer in layers if owners[layer.name] == self._team.rank]
        # The later ones take as long, which is known by then.
        for layer in own if self._any_refreshed else _with_progress(own):
            outcome[layer.name] = _attempted(factorise, layer)
        self._any_refreshed = True
        if self._team.size == 1:
            return outcome
        layouts = {
            layer.name: _Layout.of(kinds(layer), _shapes(layer), layer.adapter.matrix_shape()) for layer in layers
        }
        numbers = self._numbers_of_owners(layers, layouts, outcome)
        whole = [layer for layer in layers if not math.isnan(numbers[layer.name][0])]
        shared = self._broadcast_inverses(whole, owners, layouts, outcome, numbers)
        result: dict[str, Outcome] = {}
        for layer in layers:
            if math.isnan(numbers[layer.name][0]):
                said = f"rank {owners[layer.name]} found no factorisation"
                result[layer.name] = outcome.get(layer.name, FactorisationError(said))
            else:
                result[layer.name] = shared.get(layer.name, Elsewhere())
        return result

    def _numbers_of_owners(
        self,
        layers: Sequence[Layer],
        layouts: Mapping[str, _Layout],
        made: Mapping[str, Outcome],
    ) -> dict[str, list[float]]:
        """For each layer 0, or NaN where it failed, then its inverse's numbers; every rank must ask."""
        own: list[float] = []
        for layer in layers:
            result, names = made.get(layer.name), layouts[layer.name].numbers
            if isinstance(result, Inverse):
                own += [0.0, *(float(getattr(result, name)) for name in names)]
            else:
                own += [-math.inf if result is None else math.inf, *[-math.inf] * len(names)]
        device = next(iter(layers[0].adapter.parameters().values())).device if layers else torch.device("cpu")
        told = self._team.largest(torch.tensor(own, dtype=torch.float64, device=device)).tolist() if layers else []
        self.communication.add("inverses", 8 * len(told))
        result_numbers: dict[str, list[float]] = {}
        for layer in layers:
            count = 1 + len(layouts[layer.name].numbers)
            first, *rest = told[:count]
            del told[:count]
            result_numbers[layer.name] = [math.nan if first == math.inf else first, *rest]
        return result_numbers

    def _broadcast_inverses(
        self,
        layers: Sequence[Layer],
        owners: Mapping[str, int],
        layouts: Mapping[str, _Layout],
        made: Mapping[str, Outcome],
        numbers: Mapping[str, list[float]],
    ) -> dict[str, Inverse]:
        """The inverses that this rank is to hold, from their owners in its group."""
        members = self.placement.grid.members(self._team.rank)
        own = [layer for layer in layers if owners[layer.name] in members]
        parcels = []
        for owner, dtype, device in dict.fromkeys((owners[e.name], *_kind(e)) for e in own):
            inside = [layer for layer in own if (owners[layer.name], *_kind(layer)) == (owner, dtype, device)]
            flat = torch.empty(sum(layouts[e.name].numel() for e in inside), dtype=dtype, device=device)
            if owner == self._team.rank:
                for layer, part in zip(
                    inside, torch.split(flat, [layouts[e.name].numel() for e in inside]), strict=True
                ):
                    inverse = made[layer.name]
                    assert isinstance(inverse, Inverse)
                    layouts[layer.name].write(inverse, part)
            parcels.append((inside, flat, self._broadcast(flat, owner, members, "inverses")))
        found = {}
        for inside, flat, wait in parcels:
            wait()
            for layer, part in zip(inside, torch.split(flat, [layouts[e.name].numel() for e in inside]), strict=True):
                # The owner, too, takes what it sent, so that all hold the same to the last bit.
                found[layer.name] = layouts[layer.name].read(part, numbers[layer.name][1:])
        return found

    # Updates.

    def solved(self, ready: Sequence[Ready], damping: float) -> list[Ready]:
        """Layers with their updates, each made by a rank that holds the inverse; as they are where all hold all."""
        if self.replicated or not ready:
            return list(ready)
        grid, rank = self.placement.grid, self._team.rank
        self.communication.begin("updates")
        held = [entry for entry in ready if self.has_inverse(entry.layer)]
        made = dict(zip([entry.layer.name for entry in held], _updates(held, damping), strict=True))
        parcels = []
        for source in grid.receivers(rank):
            sent = [e for e in ready if grid.source(self.owner(e.layer) or 0, rank) == source]
            for dtype in dict.fromkeys(entry.gradient.dtype for entry in sent):
                inside = [entry for entry in sent if entry.gradient.dtype == dtype]
                sizes = [entry.gradient.numel() + 1 for entry in inside]
                flat = torch.empty(sum(sizes), dtype=dtype, device=inside[0].gradient.device)
                if source == rank:
                    for entry, part in zip(inside, torch.split(flat, sizes), strict=True):
                        update, status = made[entry.layer.name]
                        part[:-1].copy_(update.reshape(-1))
                        part[-1] = status
                wait = self._broadcast(flat, source, grid.receivers(rank), "updates")
                parcels.append((inside, torch.split(flat, sizes), wait))
        solved = {}
        for inside, parts, wait in parcels:
            wait()
            for entry, part in zip(inside, parts, strict=True):
                solved[entry.layer.name] = _with_update(entry, part[:-1].reshape(entry.gradient.shape), part[-1])
        return [solved[entry.layer.name] for entry in ready]

    # State.

    def collected(self, states: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The states of all layers, on the team's first rank; the others keep what they hold. Every rank must ask.

        Only that rank saves them. One layer at a time, in the memory of the CPU: no device need have room for all.
        """
        if self.replicated:
            return dict(states)
        result = {}
        for name, state in states.items():
            owner = self.owner(self._layers[name]) or 0
            if owner != 0 and self._team.rank == owner:
                dist.send_object_list([_on_cpu(state)], self._team.global_rank(0), group=self._team.group)
            if owner != 0 and self._team.rank == 0:
                received: list[Any] = [None]
                dist.recv_object_list(received, self._team.global_rank(owner), group=self._team.group)
                state = received[0]
            result[name] = state
        return result

    # Messages.

    def _broadcast(self, flat: Tensor, source: int, ranks: tuple[int, ...], what: str) -> Callable[[], None]:
        if len(ranks) == 1:
            return lambda: None
        self.communication.add(what, flat.nbytes)
        group = self._subgroup(ranks)
        work = dist.broadcast(flat, self._team.global_rank(source), group=group, async_op=True)
        return lambda: work.wait()

    def _subgroup(self, ranks: tuple[int, ...]) -> Any:
        if len(ranks) == self._team.size:
            return self._team.group
        if ranks not in self._groups:
            everyone = [self._team.global_rank(rank) for rank in ranks]
            # Only the group's own ranks come here: those of another tensor-parallel position make theirs.
            self._groups[ranks] = dist.new_group(everyone, use_local_synchronization=True)
        return self._groups[ranks]


@dataclass(frozen=True)
class _Layout:
    """The tensors of an inverse in a buffer, and its other numbers.

    Attributes:
        kind: The kind of inverse.
        tensors: The shape of each tensor, and whether it is symmetric.
        numbers: The names of its numbers.
    """

    kind: type[Inverse]
    tensors: Mapping[str, tuple[Shape, bool]]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, kind: type[Inverse], factors: Mapping[str, Shape], matrix: Shape) -> _Layout:
        """What follows from the factors' shapes: ``A_inverse`` is shaped as A, ``values`` as the gradient."""
        tensors: dict[str, tuple[Shape, bool]] = {}
        numbers = []
        for field in fields(kind):  # type: ignore[arg-type]  # each kind is a dataclass
            factor, _, what = field.name.partition("_")
            if what and factor in factors:
                tensors[field.name] = factors[factor], what == "inverse"
            elif field.name == "values":
                tensors[field.name] = matrix, False
            else:
                numbers.append(field.name)
        return cls(kind, tensors, tuple(numbers))

    def _sizes(self) -> list[int]:
        return [packed_numel(shape, symmetric=symmetric) for shape, symmetric in self.tensors.values()]

    def numel(self) -> int:
        """The number of elements in the buffer."""
        return sum(self._sizes())

    def write(self, inverse: Inverse, flat: Tensor) -> None:
        """Fill an inverse's part of a buffer."""
        for (name, (_, symmetric)), part in zip(self.tensors.items(), torch.split(flat, self._sizes()), strict=True):
            pack(getattr(inverse, name), part, symmetric=symmetric)

    def read(self, flat: Tensor, numbers: Iterable[float]) -> Inverse:
        """The inverse from its part of a buffer."""
        tensors = {
            name: unpack(part, shape, symmetric=symmetric)
            for (name, (shape, symmetric)), part in zip(
                self.tensors.items(), torch.split(flat, self._sizes()), strict=True
            )
        }
        return self.kind(**tensors, **dict(zip(self.numbers, numbers, strict=True)))


def _with_progress(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers that first inverses are made of, one after another; where that takes long, its progress is logged."""
    started, wait = time.monotonic(), PATIENCE
    for done, layer in enumerate(layers, 1):
        yield layer
        passed = time.monotonic() - started
        if passed >= (PATIENCE if done == len(layers) else wait):
            inform(f"KFC makes the first inverses: {done} of {len(layers)} layers after {passed:.1f} s.")
            wait = 2 * passed


def _attempted(factorise: Callable[[Layer], Inverse], layer: Layer) -> Outcome:
    try:
        return factorise(layer)
    except FactorisationError as error:
        return error
    except Exception as error:
        # Of an adapter of the user's, or for want of memory: other ranks wait for what came of it all the same.
        return FactorisationError(f"{type(error).__name__}: {error}")


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def _shapes(layer: Layer) -> Mapping[str, Shape]:
    return layer.adapter.factor_shapes()


def _kind(layer: Layer) -> tuple[torch.dtype, torch.device]:
    parameter = next(iter(layer.adapter.parameters().values()))
    return factor_dtype(parameter.dtype), parameter.device


def _updates(ready: Sequence[Ready], damping: float) -> list[tuple[Tensor, float]]:
    """The updates of layers whose inverses are here, before any clip, and what became of each."""
    result = solve(ready, damping, kl_clip=None)
    status = [FAILED if i in result.failed else RESTORED if i in result.restored else USABLE for i in range(len(ready))]
    return list(zip(result.updates, status, strict=True))


def _with_update(entry: Ready, update: Tensor, status: Tensor) -> Ready:
    """A layer with the update that a rank has made for all, so that all take the same way on."""
    # Looked at on the device: to ask for each status would wait for each.
    nothing = torch.full_like(update, math.nan)
    first = Solved(torch.where(status == USABLE, update, nothing))
    second = Solved(torch.where(status == FAILED, nothing, update))
    return Ready(entry.layer, entry.gradient, entry.learning_rate, first, second)
