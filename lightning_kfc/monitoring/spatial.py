r"""Correlations over space in the maps of a convolution: the assumptions of KFC, measured.

The paper's sec. 5.1 tests two assumptions on a trained network (arXiv:1602.01407): *spatial homogeneity*
(first and second moments depend on the offset between two locations alone) and *spatially uncorrelated derivatives*
(:math:`E[g_t g_{t'}^\top] = 0` for :math:`t \ne t'`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Quantity = Literal["activations", "derivatives"]


@dataclass(frozen=True)
class SpatialStatistics:
    r"""Tests of the paper's assumptions on the maps of one layer.

    Attributes:
        layer: The layer's name.
        quantity: ``"activations"``: the layer's input; ``"derivatives"``: those at its output.
        autocorrelation: The mean over channels of the correlation between the values of a channel at two locations,
            by their offset, shape ``(2 r_y + 1, 2 r_x + 1)``, offset 0 in the middle. NaN where every channel is
            constant.
        inhomogeneity: The second moment's standard deviation over locations divided by its mean, averaged over
            channels; 0 if all locations are alike. Noise alone gives about
            :math:`\sqrt{2/N}` for N examples of a normal distribution.
        examples: The number of maps: examples times targets per example.
    """

    layer: str
    quantity: Quantity
    autocorrelation: Tensor
    inhomogeneity: float
    examples: int

    @property
    def nearest(self) -> float:
        """The mean correlation with the four nearest neighbours (two where maps have one row or column)."""
        middle_y, middle_x = (size // 2 for size in self.autocorrelation.shape)
        neighbours = []
        if middle_y:
            neighbours.append(self.autocorrelation[middle_y + 1, middle_x])
        if middle_x:
            neighbours.append(self.autocorrelation[middle_y, middle_x + 1])
        # An offset and its opposite have the same correlation.
        return float(torch.stack(neighbours).mean()) if neighbours else 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude of a correlation between two different locations."""
        flat = self.autocorrelation.abs().flatten()
        others = torch.cat([flat[: len(flat) // 2], flat[len(flat) // 2 + 1 :]])
        return float(others.max()) if len(others) else 0.0


def autocorrelation(maps: Tensor, radius: int, *, centred: bool) -> Tensor:
    r"""The correlation between values of the same channel at two locations, by their offset.

    For an offset :math:`\delta`, :math:`\sum x_t x_{t+\delta} / \sqrt{\sum x_t^2 \sum x_{t+\delta}^2}` over all
    examples and all t such that both locations exist, averaged over channels.

    Args:
        maps: Shape ``(examples, channels, height, width)``.
        radius: The largest offset along each axis; smaller where the maps are.
        centred: Whether each channel's mean over examples and locations is subtracted first. Derivatives have
            mean 0 in the model, so theirs are not centred.

    Returns:
        Shape ``(2 r_y + 1, 2 r_x + 1)`` with ``r = min(radius, size - 1)``; NaN where every channel is constant.
    """
    height, width = maps.shape[2:]
    r_y, r_x = min(radius, height - 1), min(radius, width - 1)
    x = maps.detach().double()
    if centred:
        x = x - x.mean((0, 2, 3), keepdim=True)
    result = x.new_full((2 * r_y + 1, 2 * r_x + 1), torch.nan)
    for dy in range(r_y + 1):
        for dx in range(-r_x, r_x + 1):
            if dy == 0 and dx < 0:
                continue
            here = x[:, :, : height - dy, max(0, -dx) : width - max(0, dx)]
            there = x[:, :, dy:, max(0, dx) : width - max(0, -dx)]
            products = (here * there).sum((0, 2, 3))
            sizes = (here.square().sum((0, 2, 3)) * there.square().sum((0, 2, 3))).sqrt()
            alive = sizes > 0
            if bool(alive.any()):
                value = (products[alive] / sizes[alive]).mean()
                result[r_y + dy, r_x + dx] = result[r_y - dy, r_x - dx] = value
    return result


def inhomogeneity(maps: Tensor, *, centred: bool) -> float:
    """The inhomogeneity of a channel's second moment; see :class:`SpatialStatistics`.

    Args:
        maps: Shape ``(examples, channels, height, width)``.
        centred: Whether each channel's mean over examples and locations is subtracted first.
    """
    x = maps.detach().double()
    if centred:
        x = x - x.mean((0, 2, 3), keepdim=True)
    moment = x.square().mean(0).flatten(1)
    mean = moment.mean(1)
    alive = mean > 0
    if not bool(alive.any()):
        return 0.0
    return float((moment.std(1, correction=0)[alive] / mean[alive]).mean())
