"""Information for the user, on rank zero; problems that need action are warnings instead."""

from __future__ import annotations

import logging

from lightning_kfc.distributed import process_group as distributed

#: The package's logger; its lines have level INFO.
LOGGER = logging.getLogger("lightning_kfc")


def inform(line: str) -> None:
    """Log a line of information, on rank zero."""
    if distributed.rank() == 0:
        LOGGER.info(line)
