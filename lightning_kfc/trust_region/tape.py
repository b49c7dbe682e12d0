"""Record a forward as tensor operations, to replay it with other parameters.

No Python code of the user runs in a replay. A replay takes parameters from its caller; batch, buffers, carried state
and random numbers are those of the recording. So are tensors through which no gradient flows, such as ``x.detach()``
and what was computed under ``no_grad``: the gradient of the step belongs to a loss in which they are constants.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy

from lightning_kfc.trust_region.operators import Traits, flat, traits_of
from lightning_kfc.trust_region.random_draws import RandomDraw
from lightning_kfc.trust_region.recording import Operation, Outside, Recording, Slot
from lightning_kfc.trust_region.replay import RecordedLoss
from lightning_kfc.trust_region.storages import StorageReferences, storage_address
from lightning_kfc.utilities.torch_internals import TorchDispatchMode, unseen_by_dispatch_modes, version_of

AS_STRIDED, COPY = torch.ops.aten.as_strided.default, torch.ops.aten.copy_.default


class Tape(TorchDispatchMode):
    """Records every tensor operation inside its context.

    The tape holds tensors from outside (batch, parameters, buffers) and the former content of overwritten ones, but no
    intermediate result.

    Attributes:
        refusal: The reason why the recording cannot be replayed; None if it can.
        paused: Whether operations pass unrecorded.
    """

    # Else torch raises an error when a mode gets such an operator.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.refusal: str | None = None
        self.paused = False
        # The recording's attributes that are often read, by short names.
        self._recording = Recording()
        self._operations, self._slot_storage = self._recording.operations, self._recording.slot_storage
        self._outside, self._overwritten = self._recording.outside, self._recording.overwritten
        # By the id of a tensor: a weak reference, as ids are reused; the slot; the storage's number.
        self._known: dict[int, tuple[weakref.ref[Tensor], Slot, int | None]] = {}
        # The number of a storage, by its address.
        self._storages: dict[int, int] = {}
        self._storage_references = StorageReferences()
        # The last tensor on a storage, by the storage's number.
        self._latest: dict[int, tuple[Slot, torch.dtype]] = {}
        self._outside_storages: set[int] = set()
        # The numbers of the storages whose content depends on tensors that require gradients.
        self._trained: set[int] = set()
        # The numbers of the storages that depend on parameters by what ranks exchange: each rank has the gradient of
        # its own part alone, and all parts move.
        self._exchanged: set[int] = set()
        # The numbers of the storages that a collective has filled, and that are unread since.
        self._unread: set[int] = set()
        self._scalars: dict[Node, tuple[Slot, Tensor]] | None = None
        # By the number of a storage, and the id of a tensor without gradient on it: a weak reference, and the slot of
        # its content. Versions are no use: some operations write without a new one.
        self._constants: dict[int, dict[int, tuple[weakref.ref[Tensor], Slot]]] = {}
        self._keeps_constants = False

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
        # Without gradients, as in the forward of a custom function, operations may be a part of a differentiable
        # result. A view of a copy would not follow later writes to the original.
        self._keeps_constants = torch.is_grad_enabled() and not (traits.written or traits.aliases)
        recorded_args = [self._encoded(value, used, func) for value in args]
        recorded_kwargs = {name: self._encoded(value, used, func) for name, value in kwargs.items()} if kwargs else {}
        direct = len([value for value in recorded_args if type(value) is Slot])
        direct += len([value for value in recorded_kwargs.values() if type(value) is Slot])
        reads = self._numbers(*used)
        if not self._unread.isdisjoint(reads):
            self._freeze(args, kwargs)
        if traits.collective and func.namespace == "c10d" and self._trained.isdisjoint(reads):
            # Data that does not depend on parameters is not sent again; its first reader freezes it.
            self._about_to_be_written(func, traits, args, kwargs)
            self._unread |= reads
            return func(*args, **kwargs)
        mutates = self._about_to_be_written(func, traits, args, kwargs) if traits.written else set()
        draw = RandomDraw.of(args, kwargs) if traits.seeded else None
        if not self.replayable():
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else flat(result)
        made = [self._slot_of_result(value) if isinstance(value, Tensor) else None for value in results]
        if not self._trained.isdisjoint(reads):
            affected = mutates | {self._slot_storage[slot] for slot in made if slot is not None}
            self._trained |= affected
            if traits.collective or not self._exchanged.isdisjoint(reads):
                self._exchanged |= affected
        self._operations.append(
            Operation(func, recorded_args, recorded_kwargs, used, direct < len(used), made, reads, mutates, draw)
        )
        return result

    def replayable(self) -> bool:
        """Whether no operation was refused so far."""
        return self.refusal is None

    def finish(self) -> None:
        """End the recording; losses can still be located."""
        if self._scalars is None:
            self._scalars = self._scalar_results()
            self._known, self._constants = {}, {}
            self._storage_references.release()

    def locate(self, loss: Tensor) -> RecordedLoss | None:
        """Find a loss, or a multiple of one, on the tape; None if it is missing or 0.

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
        return RecordedLoss(self._recording, slot, whole / of_tape, len(self._operations))

    def _scalar_results(self) -> dict[Node, tuple[Slot, Tensor]]:
        found: dict[Node, tuple[Slot, Tensor]] = {}
        with unseen_by_dispatch_modes():
            for reference, slot, _ in self._known.values():
                tensor = reference()
                if tensor is not None and tensor.grad_fn is not None and tensor.numel() == 1:
                    found[tensor.grad_fn] = slot, tensor.detach().clone()
        return found

    def _refuse(self, reason: str) -> None:
        """Stop recording, and drop the recording."""
        self.refusal = reason
        self._recording.clear()
        self._known, self._constants = {}, {}

    def _encoded(self, value: Any, used: list[Slot], function: Any) -> Any:
        if isinstance(value, Tensor):
            slot = self._slot_of(value, function)
            used.append(slot)
            return slot
        # Sizes are lists of numbers alone.
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
            return type(value)([self._encoded(entry, used, function) for entry in value])
        return value

    def _slot_of(self, tensor: Tensor, function: Any) -> Slot:
        kind = type(tensor)
        if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            self._refuse(f"{function} has an argument of the tensor subclass {kind.__name__}")
            return self._new_slot(tensor, None)
        if kind is not Tensor and is_lazy(tensor):
            self._refuse(f"{function} has an argument that is not initialised yet, as those of lazy modules")
            return self._new_slot(tensor, None)
        address = storage_address(tensor)
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[2] == address:
            slot = known[1]
            storage = self._slot_storage[slot]
            trained = storage in self._trained
            stopped = trained and tensor.is_floating_point() and not tensor.requires_grad
            if stopped and self._keeps_constants and storage not in self._exchanged:
                return self._constant(tensor, storage)
            if not trained and tensor.requires_grad:
                if tensor.grad_fn is not None:
                    self._refuse_hidden(tensor, function)
                # The parameter was frozen before, as by a toggled optimizer.
                self._trained.add(self._slot_storage[slot])
            if slot in self._outside and self._recording.written_unseen(slot):
                # Written unrecorded, as by an optimizer's step: later readers get other values than earlier ones.
                return self._from_outside(tensor, address, function)
            return slot
        # Assigning to `.data` gives a known tensor another tensor's storage.
        number = None if address is None else self._storages.get(address)
        # Several parameters may share a storage, as in a recurrent layer; each has its own values.
        if number is None or (number in self._outside_storages and tensor.is_leaf and tensor.requires_grad):
            return self._from_outside(tensor, address, function)
        return self._aliasing(tensor, address, number)

    def _constant(self, tensor: Tensor, number: int) -> Slot:
        """The slot of the present content of a tensor that depends on parameters, but has no gradient."""
        constants = self._constants.setdefault(number, {})
        known = constants.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        content = tensor.detach().clone()
        slot = self._from_outside(content, storage_address(content), None)
        constants[id(tensor)] = weakref.ref(tensor), slot
        return slot

    def _refuse_hidden(self, tensor: Tensor, function: Any) -> None:
        maker = tensor.grad_fn.name() if tensor.grad_fn is not None else "?"
        self._refuse(f"{function} reads a result of {maker}, which recorded operations do not explain")

    def _aliasing(self, tensor: Tensor, address: int | None, number: int) -> Slot:
        """The slot of a tensor that shares a recorded tensor's memory without a recorded operation."""
        slot, dtype = self._whole_storage(tensor, number)
        self._recording.aliased.add(number)
        if dtype != tensor.dtype:
            slot = self._view(torch.ops.aten.view.dtype, slot, (tensor.dtype,), self._unnamed_slot(number))
        geometry = list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
        return self._view(AS_STRIDED, slot, geometry, self._new_slot(tensor, address))

    def _whole_storage(self, tensor: Tensor, number: int) -> tuple[Slot, torch.dtype]:
        """A slot for a tensor's whole storage as a vector, of the type of the last recorded tensor on it."""
        latest, dtype = self._latest[number]
        count = tensor.untyped_storage().nbytes() // dtype.itemsize
        return self._view(AS_STRIDED, latest, ([count], [1], 0), self._unnamed_slot(number)), dtype

    def _view(self, function: Any, of: Slot, arguments: tuple[Any, ...], made: Slot) -> Slot:
        numbers = self._numbers(of)
        self._operations.append(Operation(function, [of, *arguments], {}, [of], False, [made], numbers, set()))
        return made

    def _freeze(self, args: Any, kwargs: Any) -> None:
        """Record the present content of arguments that collectives have written."""
        for tensor in flat((args, kwargs)):
            address = storage_address(tensor) if isinstance(tensor, Tensor) else None
            number = None if address is None else self._storages.get(address)
            if number is None or number not in self._unread:
                continue
            self._unread.discard(number)
            whole, dtype = self._whole_storage(tensor, number)
            memory = torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage())
            content = memory.clone()
            given = self._from_outside(content, storage_address(content), None)
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
        self._outside[slot] = Outside(tensor, tensor.detach(), version_of(tensor))
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
        address = storage_address(value)
        known = self._known.get(id(value))
        if known is not None and known[0]() is value and known[2] == address:
            return known[1]
        return self._new_slot(value, address)

    def _about_to_be_written(self, function: Any, traits: Traits, args: Any, kwargs: Any) -> set[int]:
        """The numbers of the storages that an operation will write; their content is saved."""
        written: set[int] = set()
        named = [args[position] if position < len(args) else kwargs.get(name) for position, name in traits.written]
        for tensor in (leaf for leaf in flat(named) if isinstance(leaf, Tensor)):
            address = storage_address(tensor)
            if address is None or traits.resizes or tensor.is_nested:
                self._refuse(f"{function} writes a tensor in a way that cannot be repeated")
                return written
            number = self._storages[address]
            written.add(number)
            self._constants.pop(number, None)
            if number in self._outside_storages and number not in self._overwritten:
                # The whole storage: `.data`, `.detach()` and views write to the same memory.
                self._overwritten[number] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return written
