"""The unit of a layer's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: The least mean square of weights, as a share of that of PyTorch's initialisation, 1 / (3 d_in).
LEAST_SQUARE = 1e-4
#: The largest mean square of an embedding.
LARGEST_EMBEDDING = 0.01
#: The factor on the mean square of a recurrent layer's weights.
RECURRENT = 0.1


@torch.no_grad()
def mean_square(weights: Tensor, module: nn.Module) -> float:
    """The mean square of a layer's weights, which is positive and finite.

    Weights near 0 count as those of PyTorch's initialisation, so that they can move. Embeddings, which PyTorch draws
    from N(0, 1), change by far less than their size, and count as smaller. Weights of recurrent layers count as smaller
    too, since their factors leave out products between times and so underestimate the curvature.

    Args:
        weights: Shape ``(groups, d_out, d_in)``.
        module: The layer's module.
    """
    found = float(weights.square().mean(dtype=torch.float64))
    usual = 1 / (3 * weights.shape[-1])
    found = found if LEAST_SQUARE * usual < found < math.inf else usual
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return RECURRENT * found
    return min(found, LARGEST_EMBEDDING) if isinstance(module, nn.Embedding) else found
