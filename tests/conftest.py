"""Settings of the whole test suite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Two test processes share two cores, and the nets are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# Compiling and the first calls of an operator take longer than hypothesis allows by default.
settings.register_profile("lightning-kfc", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("lightning-kfc")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
