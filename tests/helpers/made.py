"""Collect objects as they are made: what happens inside of others is seen without their private attributes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


@contextlib.contextmanager
def made(cls: type[T]) -> Iterator[list[T]]:
    """The objects of a class that are made inside."""
    found: list[T] = []
    make: Any = cls.__init__

    def noted(self: T, *args: Any, **options: Any) -> None:
        found.append(self)
        make(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "__init__", noted)
        yield found
