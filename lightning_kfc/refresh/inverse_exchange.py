"""Send inverses from the ranks that factorise them to those that hold them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.remote import RemoteInverse
from lightning_kfc.factors.inverses import FactorisationError, Inverse
from lightning_kfc.factors.packing import Shape, pack, packed_numel, unpack
from lightning_kfc.monitoring.messages import inform
from lightning_kfc.utilities.load_balancing import longest_first

#: Seconds of first inverses before a line is logged; the delay doubles with each further line.
PATIENCE = 2.0
#: The result of a layer's refresh.
Outcome = Inverse | FactorisationError


class Status(IntEnum):
    """A rank's status of a layer's inverse; the largest over ranks is that of the factorising rank."""

    NOT_OWN = 0
    MADE = 1
    FAILED = 2


class InverseExchange:
    """Factorises each inverse on one rank, and sends it to the other ranks that hold it.

    Args:
        ownership: The ranks that hold each inverse.
        kind: The user's kind of inverse.
    """

    def __init__(self, ownership: LayerOwnership, kind: type[Inverse]) -> None:
        self._ownership = ownership
        self._kind = kind
        self._any_refreshed = False

    def _inverters(self, layers: Sequence[Layer]) -> dict[str, int]:
        """The rank that factorises each of the due layers; the same on every rank."""
        if self._ownership.replicated:
            # Spread over all ranks, irrespective of ownership.
            return longest_first({layer.name: layer.cost() for layer in layers}, self._ownership.group.size)
        return {layer.name: self._ownership.owner(layer) or 0 for layer in layers}

    def refreshed(self, layers: Sequence[Layer], damping: float, noise_damping: float) -> dict[str, Outcome]:
        """New inverses of layers, each factorised by one rank. Collective: call on every rank.

        Args:
            layers: The layers that are due, the same on every rank.
            damping: The damping in force at this step.
            noise_damping: See :class:`~lightning_kfc.trust_region.region.TrustRegion`.

        Returns:
            By layer: the inverse, a stand-in if another rank holds it, or the error of its factorisation.
        """
        made: dict[str, Outcome] = {}
        owners = self._inverters(layers)
        own = [layer for layer in layers if owners[layer.name] == self._ownership.group.rank]
        # Later inverses take as long as the first, so their progress is not logged.
        for layer in own if self._any_refreshed else _with_progress(own):
            made[layer.name] = self._attempt(layer, damping, noise_damping)
        self._any_refreshed = True
        if self._ownership.group.size == 1:
            return made
        layouts = {layer.name: _Layout.of(layer, layer.inverse_type(self._kind)) for layer in layers}
        sent = self._sent_by_owners(layers, layouts, made)
        whole = [layer for layer in layers if sent[layer.name][0] == Status.MADE]
        numbers = {layer.name: sent[layer.name][1] for layer in whole}
        shared = self._broadcast_inverses(whole, owners, layouts, made, numbers)
        result: dict[str, Outcome] = {}
        for layer in layers:
            if sent[layer.name][0] == Status.MADE:
                result[layer.name] = shared.get(layer.name, RemoteInverse())
            else:
                failed = FactorisationError(f"rank {owners[layer.name]} found no factorisation")
                result[layer.name] = made.get(layer.name, failed)
        return result

    def _attempt(self, layer: Layer, damping: float, noise_damping: float) -> Outcome:
        try:
            return layer.refreshed(self._kind, damping, noise_damping)
        except FactorisationError as error:
            return error
        except Exception as error:
            # Such as an error of a user's adapter, or of memory: the other ranks wait for an outcome.
            return FactorisationError(f"{type(error).__name__}: {error}")

    def _sent_by_owners(
        self, layers: Sequence[Layer], layouts: Mapping[str, _Layout], made: Mapping[str, Outcome]
    ) -> dict[str, tuple[Status, list[float]]]:
        """The status and the numbers of each layer's inverse, by layer. Collective: call on every rank.

        Automatic dampings are sent too, since every rank reviews steps.
        """
        own: list[float] = []
        for layer in layers:
            outcome, names = made.get(layer.name), layouts[layer.name].numbers
            if isinstance(outcome, Inverse):
                damping = layer.own_damping
                automatic = -math.inf if damping.automatic is None else damping.automatic
                own += [
                    Status.MADE,
                    automatic,
                    float(damping.lowered),
                    *(float(getattr(outcome, name)) for name in names),
                ]
            else:
                own += [Status.NOT_OWN if outcome is None else Status.FAILED, *[-math.inf] * (2 + len(names))]
        values = self._ownership.group.max(torch.tensor(own, dtype=torch.float64, device=layers[0].device)).tolist()
        self._ownership.communication.add("inverses", 8 * len(values))
        sent: dict[str, tuple[Status, list[float]]] = {}
        for layer in layers:
            count = 3 + len(layouts[layer.name].numbers)
            sent[layer.name] = Status(int(values[0])), values[3:count]
            if values[1] > 0:
                layer.take_damping(replace(layer.own_damping, automatic=values[1], lowered=bool(values[2])))
            del values[:count]
        return sent

    def _broadcast_inverses(
        self,
        layers: Sequence[Layer],
        owners: Mapping[str, int],
        layouts: Mapping[str, _Layout],
        made: Mapping[str, Outcome],
        numbers: Mapping[str, list[float]],
    ) -> dict[str, Inverse]:
        """Receive the inverses that this rank holds, from their owners in its group."""
        members = self._ownership.placement.grid.members(self._ownership.group.rank)
        own = [layer for layer in layers if owners[layer.name] in members]
        parcels = []
        for owner, dtype, device in dict.fromkeys((owners[e.name], e.dtype, e.device) for e in own):
            inside = [e for e in own if (owners[e.name], e.dtype, e.device) == (owner, dtype, device)]
            sizes = [layouts[e.name].numel() for e in inside]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            parts = torch.split(flat, sizes)
            if owner == self._ownership.group.rank:
                for layer, part in zip(inside, parts, strict=True):
                    inverse = made[layer.name]
                    assert isinstance(inverse, Inverse)
                    layouts[layer.name].write(inverse, part)
            parcels.append((inside, parts, self._ownership.broadcast(flat, owner, members, "inverses")))
        found = {}
        for inside, parts, wait in parcels:
            wait()
            for layer, part in zip(inside, parts, strict=True):
                # The owner reads the buffer too, so that all ranks hold the same to the last bit.
                found[layer.name] = layouts[layer.name].read(part, numbers[layer.name])
        return found


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
    def of(cls, layer: Layer, kind: type[Inverse]) -> _Layout:
        """The layout from the layer's shapes: ``A_inverse`` is shaped as A, ``values`` as the gradient."""
        factors, matrix = layer.adapter.factor_shapes(), layer.adapter.matrix_shape()
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
    """The layers of the first inverses, one by one; slow progress is logged."""
    started, wait = time.monotonic(), PATIENCE
    for done, layer in enumerate(layers, 1):
        yield layer
        passed = time.monotonic() - started
        if passed >= (PATIENCE if done == len(layers) else wait):
            inform(f"KFC computes the first inverses: {done} of {len(layers)} layers after {passed:.1f} s.")
            wait = 2 * passed
