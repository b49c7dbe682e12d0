"""The number of examples that hypothesis draws of a law."""

from __future__ import annotations

from hypothesis import settings

#: Of a law that does not say otherwise: in all tests, and in the fast ones.
USUAL, FAST = 30, 10


def examples(count: int) -> settings:
    """As many examples in all tests, a third of them in the fast ones."""
    used = settings.default
    assert used is not None
    return settings(max_examples=count * used.max_examples // USUAL)
