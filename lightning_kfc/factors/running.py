"""Zero-debiased exponential running averages of factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RunningAverage:
    r"""An exponential average that starts from nothing.

    After k updates with decay :math:`\rho` it equals
    :math:`\sum_j \rho^{k-j}(1-\rho) F_j / (1-\rho^k)`: the first update counts fully, and no trace of an
    initial identity is left (the debiasing of Adam, Kingma & Ba 2015).

    Attributes:
        value: The average, already debiased.
        weight: :math:`1-\rho^k`, the mass behind ``value``.
        squares: The sum of the squares of the shares that the updates have in ``value``.
    """

    value: Tensor
    weight: float
    squares: float = 1.0

    @classmethod
    def start(cls, value: Tensor, decay: float) -> RunningAverage:
        """The average after its first update, which is that update itself."""
        return cls(value, 1.0 - decay)

    def updated(self, value: Tensor, decay: float) -> RunningAverage:
        """The average after one more update."""
        weight = decay * self.weight + (1.0 - decay)
        share = (1.0 - decay) / weight
        return RunningAverage(self.value.lerp(value, share), weight, (1.0 - share) ** 2 * self.squares + share**2)

    @property
    def draws(self) -> float:
        """How many independent updates, equally weighted, would leave as much noise in their mean."""
        return 1.0 / self.squares
