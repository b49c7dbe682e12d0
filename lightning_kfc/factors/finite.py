"""Whether a tensor holds a NaN or an infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite.

    A sum keeps NaN and infinity, and reads the tensor once; only a sum that overflowed has to be looked at again.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
