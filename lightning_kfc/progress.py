"""Says how far something long has come, and says nothing of what is over soon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Protocol, TypeVar

T = TypeVar("T", covariant=True)

#: Seconds before the first line; each later one comes after twice the time.
PATIENCE = 2.0


class Items(Sized, Iterable[T], Protocol[T]):
    """A list, or the like."""


def announced(items: Items[T], what: str, say: Callable[[str], None] | None, patience: float = PATIENCE) -> Iterator[T]:
    """The items; lines tell how many are done, the first one after some seconds, and a last one where there was any.

    Args:
        items: What is worked on, one after another.
        what: What is made, for the lines.
        say: Takes a line; None for silence.
        patience: Seconds before the first line.
    """
    started = time.monotonic()
    wait = patience
    for done, item in enumerate(items):
        passed = time.monotonic() - started
        if say is not None and done and passed >= wait:
            say(f"{what}: {done} of {len(items)} layers after {passed:.1f} s.")
            wait = 2 * passed
        yield item
    passed = time.monotonic() - started
    if say is not None and len(items) and passed >= patience:
        say(f"{what}: all {len(items)} layers after {passed:.1f} s.")
