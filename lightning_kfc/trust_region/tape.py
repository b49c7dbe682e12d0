"""Records a forward as tensor operations, and replays them with other values of the parameters.

No Python of the user runs in a replay. The parameters that are asked for are read as they are given; everything else
(batch, buffers, carried state, random numbers) is read as it was before the recording.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kfc.utilities.isolation import (
    random_state,
    random_states_kept,
    set_random_state,
    unseen_by_dispatch_modes,
)

#: Operators of torch.distributed. Their schemas do not tell which tensors they write.
COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")

#: Operators that change the size of a tensor's memory.
RESIZES = ("aten::resize_", "aten::resize_as_", "aten::_resize_output_")

#: Operators that give a tensor other memory, as deepcopy does: whoever reads it next sees whose memory that is.
REPOINTS = ("aten::set_", "aten::set_data")

AS_STRIDED, COPY = torch.ops.aten.as_strided.default, torch.ops.aten.copy_.default


class Slot(int):
    """Stands for a tensor in the arguments of an operation: its number on the tape."""


@dataclass(frozen=True)
class Traits:
    """What is known of an operator.

    Attributes:
        is_plain: Whether it is made of tensor operations, as higher-order operators are not.
        repoints: Whether it gives a tensor other memory.
        resizes: Whether it changes the size of a tensor's memory.
        collective: Whether other ranks take part in it.
        seeded: Whether it draws random numbers.
        written: The positions and names of the arguments that it writes.
    """

    is_plain: bool
    repoints: bool = False
    resizes: bool = False
    collective: bool = False
    seeded: bool = False
    written: tuple[tuple[int, str], ...] = ()


@functools.cache
def traits_of(function: Any) -> Traits:
    """The traits of an operator, by its schema."""
    if not isinstance(function, torch._ops.OpOverload):
        return Traits(is_plain=False)
    name, collective = function._schema.name, function.namespace in COLLECTIVES
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(function._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        # The schemas of batch norms do not tell that they write their running statistics.
        or argument.name.startswith("running_")
        or collective
    )
    seeded = torch.Tag.nondeterministic_seeded in function.tags
    return Traits(True, name in REPOINTS, name in RESIZES, collective, seeded, written)


# Made at each recorded operation, and so not frozen: that would take twice the time.
@dataclass(slots=True)
class Operation:
    """One recorded operation.

    Attributes:
        function: The operator.
        args: Its positional arguments, with a slot for each tensor.
        kwargs: Its keyword arguments, likewise.
        used: All slots among its arguments.
        nested: Whether a container among its arguments holds slots.
        made: The slots of the tensors that it returned, in order; None for other results.
        reads: The numbers of the storages that it read.
        mutates: The numbers of the storages that it wrote in place.
        draw: The state of its random generator before it ran; None where it draws no random numbers.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    used: list[Slot]
    nested: bool
    made: list[Slot | None]
    reads: set[int]
    mutates: set[int]
    draw: RandomDraw | None = None


@dataclass(frozen=True)
class Outside:
    """A tensor that no recorded operation has made.

    Attributes:
        tensor: The tensor.
        alias: Another one on the memory that it had when it was read; its ``.data`` may be exchanged later.
        version: How often it had been written when it was read.
    """

    tensor: Tensor
    alias: Tensor
    version: int


@dataclass(frozen=True)
class RecordedLoss:
    """Where on a tape a loss is.

    Attributes:
        tape: The tape.
        slot: The tensor that the loss is a multiple of.
        factor: The loss, as a multiple of that tensor.
        length: The number of operations that had been recorded when the loss was known.
    """

    tape: Tape
    slot: Slot
    factor: float
    length: int

    def replay(self, values: Mapping[int, Tensor], *, with_collectives: bool) -> float:
        """Evaluate the loss again.

        Args:
            values: What is read in the place of a parameter, by the parameter's ``id``.
            with_collectives: Whether the recorded collectives run whether or not the loss depends on them. All ranks
                must decide alike.
        """
        return self.factor * float(self.tape.replay(self.slot, self.length, values, with_collectives=with_collectives))

    def is_stale(self) -> bool:
        """Whether anything that it depends on has been written since it was recorded, by no recorded operation."""
        return self.tape.is_stale(self.slot, self.length)

    @property
    def needs_collectives(self) -> bool:
        """Whether the loss depends on what other ranks send."""
        return any(
            traits_of(op.function).collective
            for op, _ in self.tape.slice(self.slot, self.length, with_collectives=False)
        )


#: Operations in order, each with the slots that none after it uses.
Slice = list[tuple[Operation, set[Slot]]]


class Tape(TorchDispatchMode):
    """While it is entered, every tensor operation is recorded.

    It holds the tensors that were there before (the batch, parameters, buffers) and the former content of those that
    are overwritten, but no intermediate result.

    Attributes:
        refusal: Why the recording cannot be replayed; None where it can.
        paused: Whether operations pass unrecorded.
    """

    # Else torch raises an error where such an operator meets a mode.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.refusal: str | None = None
        self.paused = False
        self._operations: list[Operation] = []
        # By the id of a tensor: a reference that tells whether it is still that tensor, its slot, and its storage.
        self._known: dict[int, tuple[weakref.ref[Tensor], Slot, int | None]] = {}
        self._slot_storage: list[int] = []
        # By the address of a storage: its number.
        self._storages: dict[int, int] = {}
        self._storage_references = _StorageReferences()
        # By the number of a storage: the last tensor on it.
        self._latest: dict[int, tuple[Slot, torch.dtype]] = {}
        self._outside: dict[Slot, Outside] = {}
        self._outside_storages: set[int] = set()
        self._overwritten: dict[int, torch.UntypedStorage] = {}
        # The numbers of the storages that other tensors than the recorded ones look into.
        self._aliased: set[int] = set()
        # The numbers of the storages whose content depends on tensors that require gradients.
        self._trained: set[int] = set()
        # The numbers of the storages that a collective has filled and nothing has read since.
        self._unread: set[int] = set()
        self._scalars: dict[Node, tuple[Slot, Tensor]] | None = None
        self._slices: dict[tuple[Slot, int, bool], Slice] = {}

    # Recording.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        kwargs = kwargs or {}
        traits = traits_of(func)
        if self.paused or not self.replayable() or traits.repoints:
            return func(*args, **kwargs)
        if not traits.is_plain:
            self._refuse(f"the higher-order operator {func} is not made of tensor operations")
            return func(*args, **kwargs)
        used: list[Slot] = []
        recorded_args = [self._encoded(value, used, func) for value in args]
        recorded_kwargs = {name: self._encoded(value, used, func) for name, value in kwargs.items()} if kwargs else {}
        direct = len([value for value in recorded_args if type(value) is Slot])
        direct += len([value for value in recorded_kwargs.values() if type(value) is Slot])
        reads = self._numbers(*used)
        if not self._unread.isdisjoint(reads):
            self._freeze(args, kwargs)
        if traits.collective and func.namespace == "c10d" and self._trained.isdisjoint(reads):
            # What does not depend on parameters need not be sent again. When it has arrived, its first reader sees.
            self._about_to_be_written(func, traits, args, kwargs)
            self._unread |= reads
            return func(*args, **kwargs)
        mutates = self._about_to_be_written(func, traits, args, kwargs) if traits.written else set()
        draw = RandomDraw.of(args, kwargs) if traits.seeded else None
        if not self.replayable():
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else _flat(result)
        made = [self._slot_of_result(value) if isinstance(value, Tensor) else None for value in results]
        if not self._trained.isdisjoint(reads):
            self._trained |= mutates
            self._trained.update([self._slot_storage[slot] for slot in made if slot is not None])
        self._operations.append(
            Operation(func, recorded_args, recorded_kwargs, used, direct < len(used), made, reads, mutates, draw)
        )
        return result

    def replayable(self) -> bool:
        """Whether nothing was refused so far."""
        return self.refusal is None

    def finish(self) -> None:
        """End the recording: keep what finds a loss, and let go of what finds a tensor."""
        if self._scalars is None:
            self._scalars = self._scalar_results()
            self._known = {}
            self._storage_references.release()

    def locate(self, loss: Tensor) -> RecordedLoss | None:
        """Find a loss on the tape, given it or a multiple of it; None where it is not there, or is 0.

        Lightning divides the loss of a training step by the number of accumulated batches, and a gradient scaler
        multiplies it, after the recording has ended.
        """
        scalars = self._scalar_results() if self._scalars is None else self._scalars
        node = loss.grad_fn
        while node is not None and node not in scalars:
            below = [next_node for next_node, _ in node.next_functions if next_node is not None]
            node = below[0] if len(below) == 1 else None
        if node is None:
            return None
        slot, value = scalars[node]
        of_tape, whole = float(value), float(loss.detach())
        if not (math.isfinite(of_tape) and math.isfinite(whole)) or of_tape == 0:
            return None
        return RecordedLoss(self, slot, whole / of_tape, len(self._operations))

    def _scalar_results(self) -> dict[Node, tuple[Slot, Tensor]]:
        found: dict[Node, tuple[Slot, Tensor]] = {}
        with unseen_by_dispatch_modes():
            for reference, slot, _ in self._known.values():
                tensor = reference()
                if tensor is not None and tensor.grad_fn is not None and tensor.numel() == 1:
                    found[tensor.grad_fn] = slot, tensor.detach().clone()
        return found

    def _refuse(self, reason: str) -> None:
        """Record nothing any more, and let go of what was recorded."""
        self.refusal = reason
        self._operations, self._known, self._outside, self._overwritten = [], {}, {}, {}

    def _encoded(self, value: Any, used: list[Slot], function: Any) -> Any:
        if isinstance(value, Tensor):
            slot = self._slot_of(value, function)
            used.append(slot)
            return slot
        # Sizes and the like are numbers throughout.
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
            return type(value)([self._encoded(entry, used, function) for entry in value])
        return value

    def _slot_of(self, tensor: Tensor, function: Any) -> Slot:
        kind = type(tensor)
        if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            self._refuse(f"{function} has an argument of the tensor subclass {kind.__name__}")
            return self._new_slot(tensor, None)
        if kind is not Tensor and is_lazy(tensor):
            self._refuse(f"{function} has an argument that is not initialised yet, as lazy modules have it")
            return self._new_slot(tensor, None)
        address = _storage_address(tensor)
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[2] == address:
            slot = known[1]
            if self._slot_storage[slot] not in self._trained and tensor.requires_grad:
                if tensor.grad_fn is not None:
                    self._refuse_hidden(tensor, function)
                # A parameter that was frozen before, as toggled optimizers have it.
                self._trained.add(self._slot_storage[slot])
            if slot in self._outside and self._written_unseen(slot):
                # By an optimizer's step, for one: what reads it now sees other values than what read it before.
                return self._from_outside(tensor, address, function)
            return slot
        # Assigning to `.data` gives a known tensor another storage; what holds that storage is another tensor's slot.
        number = None if address is None else self._storages.get(address)
        # Several parameters may share a storage, as those of a recurrent layer do: each has its own values.
        if number is None or (number in self._outside_storages and tensor.is_leaf and tensor.requires_grad):
            return self._from_outside(tensor, address, function)
        return self._aliasing(tensor, address, number)

    def _written_unseen(self, slot: Slot) -> bool:
        outside = self._outside[slot]
        return self._slot_storage[slot] not in self._overwritten and _version(outside.tensor) != outside.version

    def is_stale(self, slot: Slot, length: int) -> bool:
        """Whether a tensor depends on anything that was written since it was read, by no recorded operation."""
        operations = self.slice(slot, length, with_collectives=False)
        read = {used for operation, _ in operations for used in operation.used}
        return any(self._written_unseen(used) for used in read if used in self._outside)

    def _refuse_hidden(self, tensor: Tensor, function: Any) -> None:
        maker = tensor.grad_fn.name() if tensor.grad_fn is not None else "?"
        self._refuse(f"{function} reads a result of {maker}, which recorded operations do not explain")

    def _aliasing(self, tensor: Tensor, address: int | None, number: int) -> Slot:
        """The slot of a tensor that came to share the memory of a recorded one without an operation that tells."""
        slot, dtype = self._whole_storage(tensor, number)
        self._aliased.add(number)
        if dtype != tensor.dtype:
            slot = self._view(torch.ops.aten.view.dtype, slot, (tensor.dtype,), self._unnamed_slot(number))
        geometry = list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
        return self._view(AS_STRIDED, slot, geometry, self._new_slot(tensor, address))

    def _whole_storage(self, tensor: Tensor, number: int) -> tuple[Slot, torch.dtype]:
        """A slot for all of a tensor's memory as a vector, of the type of the last recorded tensor on it."""
        latest, dtype = self._latest[number]
        count = tensor.untyped_storage().nbytes() // dtype.itemsize
        return self._view(AS_STRIDED, latest, ([count], [1], 0), self._unnamed_slot(number)), dtype

    def _view(self, function: Any, of: Slot, arguments: tuple[Any, ...], made: Slot) -> Slot:
        numbers = self._numbers(of)
        self._operations.append(Operation(function, [of, *arguments], {}, [of], False, [made], numbers, set()))
        return made

    def _freeze(self, args: Any, kwargs: Any) -> None:
        """Take what collectives have written into these arguments for what a replay finds in them."""
        for tensor in _flat((args, kwargs)):
            address = _storage_address(tensor) if isinstance(tensor, Tensor) else None
            number = None if address is None else self._storages.get(address)
            if number is None or number not in self._unread:
                continue
            self._unread.discard(number)
            whole, dtype = self._whole_storage(tensor, number)
            memory = torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage())
            content = memory.clone()
            given = self._from_outside(content, _storage_address(content), None)
            self._operations.append(
                Operation(COPY, [whole, given], {}, [whole, given], False, [whole], self._numbers(given), {number})
            )

    def _numbers(self, *slots: Slot) -> set[int]:
        return {self._slot_storage[slot] for slot in slots}

    def _unnamed_slot(self, number: int) -> Slot:
        self._slot_storage.append(number)
        return Slot(len(self._slot_storage) - 1)

    def _from_outside(self, tensor: Tensor, address: int | None, function: Any) -> Slot:
        if tensor.grad_fn is not None:
            self._refuse_hidden(tensor, function)
        slot = self._new_slot(tensor, address)
        self._outside_storages.add(self._slot_storage[slot])
        if tensor.requires_grad:
            self._trained.add(self._slot_storage[slot])
        self._outside[slot] = Outside(tensor, tensor.detach(), _version(tensor))
        return slot

    def _new_slot(self, tensor: Tensor, address: int | None) -> Slot:
        slot = Slot(len(self._slot_storage))
        number = None if address is None else self._storages.get(address)
        if number is None:
            number = len(self._slot_storage)
            if address is not None:
                self._storages[address] = number
                self._storage_references.hold(tensor.untyped_storage())
        self._slot_storage.append(number)
        if address is not None:
            self._latest[number] = slot, tensor.dtype
        self._known[id(tensor)] = weakref.ref(tensor), slot, address
        return slot

    def _slot_of_result(self, value: Tensor) -> Slot:
        address = _storage_address(value)
        known = self._known.get(id(value))
        if known is not None and known[0]() is value and known[2] == address:
            return known[1]
        return self._new_slot(value, address)

    def _about_to_be_written(self, function: Any, traits: Traits, args: Any, kwargs: Any) -> set[int]:
        """The numbers of the storages that an operation is going to write; their content is kept."""
        written: set[int] = set()
        named = [args[position] if position < len(args) else kwargs.get(name) for position, name in traits.written]
        for tensor in (leaf for leaf in _flat(named) if isinstance(leaf, Tensor)):
            address = _storage_address(tensor)
            if address is None or traits.resizes or tensor.is_nested:
                self._refuse(f"{function} writes a tensor in a way that cannot be repeated")
                return written
            number = self._storages[address]
            written.add(number)
            if number in self._outside_storages and number not in self._overwritten:
                # By storage: `.data`, `.detach()` and views write to the same memory under another name.
                self._overwritten[number] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return written

    # Replay.

    def slice(self, slot: Slot, length: int, *, with_collectives: bool) -> Slice:
        """The operations, of the first ``length`` ones, on which a tensor depends, each with what it uses last."""
        key = slot, length, with_collectives
        if key not in self._slices:
            live, needed, kept = {self._slot_storage[slot]}, {slot}, []
            for operation in reversed(self._operations[:length]):
                collective = with_collectives and traits_of(operation.function).collective
                made = [result for result in operation.made if result is not None]
                if collective or not needed.isdisjoint(made) or not live.isdisjoint(operation.mutates):
                    live |= operation.reads
                    last = {*operation.used, *made} - needed
                    needed |= last
                    kept.append((operation, last))
            self._slices[key] = kept[::-1]
        return self._slices[key]

    @torch.no_grad()
    def replay(self, slot: Slot, length: int, parameters: Mapping[int, Tensor], *, with_collectives: bool) -> Tensor:
        """Run the operations again that a tensor depends on.

        Args:
            slot: The tensor.
            length: The number of recorded operations that are looked at.
            parameters: What is read in the place of a parameter, by the parameter's ``id``.
            with_collectives: Whether all recorded collectives are run.

        Returns:
            The tensor's value. Nothing that is outside the tape is changed, random streams included.

        Raises:
            RuntimeError: If an operation fails; the message names it.
        """
        operations = self.slice(slot, length, with_collectives=with_collectives)
        read = {used for operation, _ in operations for used in operation.used} | {slot}
        draws = [operation.draw for operation, _ in operations if operation.draw is not None]
        drawn_from = {draw.device for draw in draws if not draw.own}
        with unseen_by_dispatch_modes(), random_states_kept(drawn_from), contextlib.ExitStack() as stack:
            values = self._values_from_outside(read, parameters)
            for device in {tensor.device.type for tensor in values.values()} | {"cpu"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            for operation, last in operations:
                try:
                    _run(operation, values)
                except Exception as error:
                    raise RuntimeError(f"{operation.function} could not be run again: {error}") from error
                for used in last:
                    values.pop(used, None)
            return values[slot]

    def _values_from_outside(self, read: set[Slot], parameters: Mapping[int, Tensor]) -> dict[Slot, Tensor]:
        values: dict[Slot, Tensor] = {}
        copies: dict[int, torch.UntypedStorage] = {}
        for slot, outside in self._outside.items():
            if slot not in read:
                continue
            tensor = outside.alias
            given, number = parameters.get(id(outside.tensor)), self._slot_storage[slot]
            former = self._overwritten.get(number)
            if former is None and (given is None or number not in self._aliased):
                values[slot] = tensor if given is None else given.detach()
                continue
            if number not in copies:
                former = tensor.untyped_storage() if former is None else former
                copies[number] = former.clone()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            values[slot] = _on_storage(tensor, copies[number])
            if given is not None:
                values[slot].copy_(given)
        return values


def _storage_address(tensor: Tensor) -> int | None:
    """What tells storages apart; None for tensors without one (sparse ones)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None


def _version(tensor: Tensor) -> int:
    # A tensor made under inference mode has none.
    return 0 if tensor.is_inference() else tensor._version


def _on_storage(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor of the same geometry on another storage."""
    moved = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    moved = moved.conj() if tensor.is_conj() else moved
    return torch._neg_view(moved) if tensor.is_neg() else moved


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for entry in value for leaf in _flat(entry)]
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in _flat(entry)]
    return [value]


def _run(operation: Operation, values: dict[Slot, Tensor]) -> None:
    """Run an operation again, on values and for values by slot."""
    draw = operation.draw
    if draw is not None and not draw.own:
        set_random_state(draw.device, draw.state)
    args, kwargs = operation.args, operation.kwargs
    if operation.nested or draw is not None:
        args, kwargs = _decoded((args, kwargs), values, draw)
    else:
        args = [values[value] if type(value) is Slot else value for value in args]
        if kwargs:
            kwargs = {name: values[value] if type(value) is Slot else value for name, value in kwargs.items()}
    result = operation.function(*args, **kwargs)
    if isinstance(result, Tensor):
        if operation.made[0] is not None:
            values[operation.made[0]] = result
        return
    for made, value in zip(operation.made, _flat(result), strict=True):
        if made is not None:
            values[made] = value
        elif hasattr(value, "wait"):
            # The handle of a collective.
            value.wait()


def _decoded(value: Any, values: Mapping[Slot, Tensor], draw: RandomDraw | None) -> Any:
    if isinstance(value, Slot):
        return values[value]
    if isinstance(value, torch.Generator) and draw is not None:
        return draw.generator()
    if isinstance(value, (list, tuple)):
        return type(value)([_decoded(entry, values, draw) for entry in value])
    if isinstance(value, dict):
        return {name: _decoded(entry, values, draw) for name, entry in value.items()}
    return value


class _StorageReferences:
    """Weak references to storages: while they are held, no later storage gets the address of one that is gone."""

    def __init__(self) -> None:
        self._references: list[Any] = []

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Hold a reference to a storage, which does not keep its memory."""
        self._references.append(storage._weak_ref())

    def release(self) -> None:
        """Let go of all references."""
        while self._references:
            torch.UntypedStorage._free_weak_ref(self._references.pop())  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def __del__(self) -> None:
        self.release()


@dataclass(frozen=True)
class RandomDraw:
    """The state of a random generator before an operation that draws from it, so that any part of a tape is replayed.

    Attributes:
        device: The generator's device.
        own: Whether the operation has a generator of its own among its arguments; else the device's default.
        state: The state.
    """

    device: torch.device
    own: bool
    state: Tensor

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> RandomDraw:
        """The present state of the generator that an operation with these arguments draws from."""
        leaves = _flat((args, kwargs))
        for generator in leaves:
            if isinstance(generator, torch.Generator):
                return cls(generator.device, True, generator.get_state())
        devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
        device = devices[0] if devices else torch.device(kwargs.get("device") or "cpu")
        return cls(device, False, random_state(device))

    def generator(self) -> torch.Generator:
        """A generator in this state."""
        return torch.Generator(self.device).set_state(self.state)
