"""Run recorded operations again, with other values of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.trust_region.operators import flat, traits_of
from lightning_kfc.trust_region.random_draws import RandomDraw
from lightning_kfc.trust_region.recording import Operation, Recording, Slot
from lightning_kfc.trust_region.storages import on_storage
from lightning_kfc.utilities.isolation import random_states_kept, set_random_state
from lightning_kfc.utilities.torch_internals import unseen_by_dispatch_modes


@dataclass(frozen=True)
class RecordedLoss:
    """A loss in a recording.

    Attributes:
        recording: The recording.
        slot: A tensor on the tape of which the loss is a multiple.
        factor: The multiple.
        length: The number of operations before the loss.
    """

    recording: Recording
    slot: Slot
    factor: float
    length: int

    def replay(self, values: Mapping[int, Tensor], *, with_collectives: bool) -> float:
        """Evaluate the loss again.

        Args:
            values: Replacements of parameters, by the parameter's ``id``.
            with_collectives: Whether to run also the recorded collectives that the loss does not depend on; equal on
                all ranks.
        """
        value = replay(self.recording, self.slot, self.length, values, with_collectives=with_collectives)
        return self.factor * float(value)

    def is_stale(self) -> bool:
        """Whether an unrecorded operation has written a source of the loss later."""
        return self.recording.is_stale(self.slot, self.length)

    @property
    def needs_collectives(self) -> bool:
        """Whether the loss depends on data of other ranks."""
        return any(
            traits_of(op.function).collective
            for op, _ in self.recording.slice(self.slot, self.length, with_collectives=False)
        )


@torch.no_grad()
def replay(
    recording: Recording, slot: Slot, length: int, parameters: Mapping[int, Tensor], *, with_collectives: bool
) -> Tensor:
    """Run again the operations on which a tensor depends.

    Args:
        recording: The recording.
        slot: The tensor.
        length: The number of considered operations.
        parameters: Replacements of parameters, by the parameter's ``id``.
        with_collectives: Whether to run all recorded collectives.

    Returns:
        The tensor's value. Tensors and random streams outside the recording stay unchanged.

    Raises:
        RuntimeError: If an operation fails; the message names it.
    """
    operations = recording.slice(slot, length, with_collectives=with_collectives)
    read = {used for operation, _ in operations for used in operation.used} | {slot}
    draws = [operation.draw for operation, _ in operations if operation.draw is not None]
    drawn_from = {draw.device for draw in draws if not draw.own}
    with unseen_by_dispatch_modes(), random_states_kept(drawn_from), contextlib.ExitStack() as stack:
        values = _values_from_outside(recording, read, parameters)
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


def _values_from_outside(recording: Recording, read: set[Slot], parameters: Mapping[int, Tensor]) -> dict[Slot, Tensor]:
    values: dict[Slot, Tensor] = {}
    copies: dict[int, torch.UntypedStorage] = {}
    for slot, outside in recording.outside.items():
        if slot not in read:
            continue
        tensor = outside.alias
        given, number = parameters.get(id(outside.tensor)), recording.slot_storage[slot]
        former = recording.overwritten.get(number)
        if former is None and (given is None or number not in recording.aliased):
            values[slot] = tensor if given is None else given.detach()
            continue
        if number not in copies:
            former = tensor.untyped_storage() if former is None else former
            copies[number] = former.clone()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        values[slot] = on_storage(tensor, copies[number])
        if given is not None:
            values[slot].copy_(given)
    return values


def _run(operation: Operation, values: dict[Slot, Tensor]) -> None:
    """Run an operation again; read and write the values by slot."""
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
    for made, value in zip(operation.made, flat(result), strict=True):
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
