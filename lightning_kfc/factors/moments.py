"""Adam's moments of a layer's gradient, in the eigenbasis of its factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_kfc.factors.eigenbasis import Eigenbasis
from lightning_kfc.factors.inverses import EighInverse, Inverse

#: The decays of Adam's first and second moment.
MOMENTUM_DECAY, SECOND_MOMENT_DECAY = 0.9, 0.95
#: Beside the mean root of the second moments, which has the loss's unit.
EPSILON = 1e-5


@dataclass(frozen=True)
class Moments:
    """Adam's running moments of a layer's gradient, in the layer's eigenbasis where it has one.

    Attributes:
        momentum: Not debiased, shape ``(groups, d_out, d_in)``.
        second_moment: Not debiased, of the same shape.
        count: The number of steps they have seen.
    """

    momentum: Tensor
    second_moment: Tensor
    count: int = 0

    @classmethod
    def none(cls, gradient: Tensor) -> Self:
        """Before the first step."""
        return cls(torch.zeros_like(gradient), torch.zeros_like(gradient))

    def updated(self, gradient: Tensor) -> Self:
        """With the gradient of one more step."""
        return replace(
            self,
            momentum=self.momentum.lerp(gradient, 1 - MOMENTUM_DECAY),
            second_moment=self.second_moment.lerp(gradient.square(), 1 - SECOND_MOMENT_DECAY),
            count=self.count + 1,
        )

    def direction(self, gradient: Tensor) -> Tensor:
        r""":math:`\hat M \oslash (\sqrt{\hat S} + \epsilon)`, given the gradient that was folded in last."""
        # Nesterov: the momentum as the next step would have it if this gradient came again.
        ahead = self.momentum * (MOMENTUM_DECAY / (1 - MOMENTUM_DECAY ** (self.count + 1)))
        ahead = ahead.add(gradient, alpha=(1 - MOMENTUM_DECAY) / (1 - MOMENTUM_DECAY**self.count))
        size = (self.second_moment / (1 - SECOND_MOMENT_DECAY**self.count)).sqrt_()
        tiny = torch.finfo(size.dtype).tiny
        return ahead.div_(size.add_(EPSILON * size.mean((-1, -2), keepdim=True) + tiny))

    def in_basis(self, old: Inverse | None, new: Inverse | None) -> Self:
        """The same moments where the basis of one inverse has given way to that of another.

        The momentum is a matrix and is rotated. The second moments stay where they are: both bases are in the order of
        their eigenvalues. To take the diagonal that they have in the new basis, as EKFAC does, spreads each over all
        directions between which rounding or noise decides, and was seen to train clearly more slowly.
        """
        before, after = eigenbasis(old), eigenbasis(new)
        if before is None or after is None or before.same_as(after) or not before.fits(after):
            return self
        return replace(self, momentum=after.project(before.back(self.momentum)))

    def without_momentum(self) -> Self:
        """After a step that was taken back: the momentum led astray."""
        return replace(self, momentum=torch.zeros_like(self.momentum))

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return self.momentum.nbytes + self.second_moment.nbytes

    def state_dict(self) -> dict[str, Tensor | int]:
        """Plain tensors and a number."""
        return {"momentum": self.momentum, "second_moment": self.second_moment, "count": self.count}


def eigenbasis(inverse: Inverse | None) -> Eigenbasis | None:
    """The basis in which a layer's moments are kept; None where they are kept for its parameters as they are.

    That is where curvature is a diagonal or a block, or where one of the two factors is a diagonal (an embedding):
    there a basis would hold a part of the coordinates apart and mix the rest.
    """
    if isinstance(inverse, EighInverse) and inverse.A_vectors.ndim == inverse.G_vectors.ndim == 3:
        return inverse.basis
    return None
