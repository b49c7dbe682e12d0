"""Adam's moments of a layer's gradient, in the eigenbasis of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_kfc.factors.eigenbasis import Eigenbasis
from lightning_kfc.factors.inverses import EighInverse, Inverse

#: The decays of Adam's first and second moment.
MOMENTUM_DECAY, SECOND_MOMENT_DECAY = 0.9, 0.95
#: Adam's epsilon, relative to the mean root of the second moments, so that it has no unit.
EPSILON = 1e-5


@dataclass(frozen=True)
class Moments:
    """Adam's running moments of a layer's gradient, in the layer's eigenbasis if it has one.

    Attributes:
        momentum: The first moment, not debiased, shape ``(groups, d_out, d_in)``.
        second_moment: The second moment, not debiased, of the same shape.
        count: The number of steps.
    """

    momentum: Tensor
    second_moment: Tensor
    count: int = 0

    @classmethod
    def none(cls, gradient: Tensor) -> Self:
        """The moments before the first step."""
        return cls(torch.zeros_like(gradient), torch.zeros_like(gradient))

    @classmethod
    def stacked(cls, moments: Sequence[Self]) -> Self:
        """The moments of layers of one shape and count, with an axis for the layers in front."""
        momenta, squares = [own.momentum for own in moments], [own.second_moment for own in moments]
        return cls(stack(momenta), stack(squares), moments[0].count)

    def unstacked(self) -> list[Self]:
        """The moments of each layer of :meth:`stacked`, as views."""
        pairs = zip(self.momentum, self.second_moment, strict=True)
        return [replace(self, momentum=momentum, second_moment=square) for momentum, square in pairs]

    def updated(self, gradient: Tensor) -> Self:
        """The moments after one more gradient."""
        return replace(
            self,
            momentum=self.momentum.lerp(gradient, 1 - MOMENTUM_DECAY),
            second_moment=self.second_moment.lerp(gradient.square(), 1 - SECOND_MOMENT_DECAY),
            count=self.count + 1,
        )

    def direction(self, gradient: Tensor) -> Tensor:
        r""":math:`\hat M \oslash (\sqrt{\hat S} + \epsilon)`, given the last gradient."""
        # Nesterov: the momentum after a repetition of this gradient.
        ahead = self.momentum * (MOMENTUM_DECAY / (1 - MOMENTUM_DECAY ** (self.count + 1)))
        ahead = ahead.add(gradient, alpha=(1 - MOMENTUM_DECAY) / (1 - MOMENTUM_DECAY**self.count))
        size = (self.second_moment / (1 - SECOND_MOMENT_DECAY**self.count)).sqrt_()
        tiny = torch.finfo(size.dtype).tiny
        return ahead.div_(size.add_(EPSILON * size.mean((-1, -2), keepdim=True) + tiny))

    def in_basis(self, old: Inverse | None, new: Inverse | None) -> Self:
        """The moments in the basis of a new inverse.

        The momentum is rotated. The second moments keep their places, since both bases are in the order of their
        eigenvalues. A rotation of them, as in EKFAC, mixes directions whose order depends on rounding or noise, and
        trained clearly more slowly.
        """
        before, after = eigenbasis(old), eigenbasis(new)
        if before is None or after is None or before.same_as(after) or not before.fits(after):
            return self
        return replace(self, momentum=after.project(before.back(self.momentum)))

    def without_momentum(self) -> Self:
        """The moments after an undone step, whose direction the momentum must not keep."""
        return replace(self, momentum=torch.zeros_like(self.momentum))

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return self.momentum.nbytes + self.second_moment.nbytes

    def state_dict(self) -> dict[str, Tensor | int]:
        """Plain tensors and a number."""
        return {"momentum": self.momentum, "second_moment": self.second_moment, "count": self.count}


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors with an axis in front; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def eigenbasis(inverse: Inverse | None) -> Eigenbasis | None:
    """The basis of a layer's moments; None for moments of the parameters themselves.

    There is none for a curvature that is a diagonal or a block, and none if one of the two factors is diagonal, as in
    an embedding: such a basis would mix the coordinates of one side only.
    """
    if isinstance(inverse, EighInverse) and inverse.A_vectors.ndim == inverse.G_vectors.ndim == 3:
        return inverse.basis
    return None
