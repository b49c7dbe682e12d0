"""Traits of torch's operators, read from their schemas."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from lightning_kfc.utilities.torch_internals import COLLECTIVES, schema_of

#: Operators that change the size of a tensor's memory.
RESIZES = ("aten::resize_", "aten::resize_as_", "aten::_resize_output_")

#: Operators that give a tensor other memory, as deepcopy does; the tensor's next reader looks the memory up.
REPOINTS = ("aten::set_", "aten::set_data")


@dataclass(frozen=True)
class Traits:
    """Traits of an operator.

    Attributes:
        is_plain: Whether it is an ordinary operator, and no higher-order one.
        repoints: Whether it gives a tensor other memory.
        resizes: Whether it changes the size of a tensor's memory.
        collective: Whether other ranks take part in it.
        seeded: Whether it draws random numbers.
        written: The positions and names of the arguments that it writes.
        aliases: Whether its results may share memory with its arguments.
    """

    is_plain: bool
    repoints: bool = False
    resizes: bool = False
    collective: bool = False
    seeded: bool = False
    written: tuple[tuple[int, str], ...] = ()
    aliases: bool = False


@functools.cache
def traits_of(function: Any) -> Traits:
    """The traits of an operator, by its schema."""
    schema = schema_of(function)
    if schema is None:
        return Traits(is_plain=False)
    name, collective = schema.name, function.namespace in COLLECTIVES
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        # The schemas of batch norms do not mark their running statistics as written.
        or argument.name.startswith("running_")
        # Nor do those of torch.distributed.
        or collective
    )
    seeded = torch.Tag.nondeterministic_seeded in function.tags
    aliases = any(argument.alias_info is not None for argument in schema.arguments)
    return Traits(True, name in REPOINTS, name in RESIZES, collective, seeded, written, aliases)


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts, in order."""
    if isinstance(value, (list, tuple)):
        return [leaf for entry in value for leaf in flat(entry)]
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in flat(entry)]
    return [value]
