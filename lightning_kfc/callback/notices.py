"""Messages on rank zero, each once in a fit."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class Notices:
    """Logs or warns on rank zero, each message once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def inform(self, message: str) -> None:
        """Log a message once."""
        if self._is_new(message):
            rank_zero_info(message)

    def warn(self, message: str) -> None:
        """Warn once."""
        if self._is_new(message):
            rank_zero_warn(message)

    def _is_new(self, message: str) -> bool:
        new = message not in self._given
        self._given.add(message)
        return new
