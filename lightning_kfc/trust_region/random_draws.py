"""States of random generators, with which a replay draws the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.trust_region.operators import flat
from lightning_kfc.utilities.isolation import random_state


@dataclass(frozen=True)
class RandomDraw:
    """The state of a random generator before an operation that draws from it.

    Each operation has its own state, so that a replay of a part of a recording draws the same numbers.

    Attributes:
        device: The generator's device.
        own: Whether the generator is an argument of the operation; else it is the device's default.
        state: The state.
    """

    device: torch.device
    own: bool
    state: Tensor

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> RandomDraw:
        """The state of the generator that an operation with these arguments uses."""
        leaves = flat((args, kwargs))
        for generator in leaves:
            if isinstance(generator, torch.Generator):
                return cls(generator.device, True, generator.get_state())
        devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
        device = devices[0] if devices else torch.device(kwargs.get("device") or "cpu")
        return cls(device, False, random_state(device))

    def generator(self) -> torch.Generator:
        """A generator in this state."""
        return torch.Generator(self.device).set_state(self.state)
