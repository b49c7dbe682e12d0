"""Information for the user, on rank zero alone; what needs action is a warning instead."""

from __future__ import annotations

import logging

from lightning_kfc.distributed import process_group as distributed

#: Takes lines of information at level INFO. A plain loop shows them as it shows those of other loggers.
LOGGER = logging.getLogger("lightning_kfc")


def inform(line: str) -> None:
    """Log a line of information, on rank zero."""
    if distributed.rank() == 0:
        LOGGER.info(line)
