"""What is known of the losses of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossTraits:
    """What holds for all losses of a step.

    Attributes:
        never_negative: Whether they are bounded by 0.
        saturates: Whether their curvature falls to 0 with them.
        cancelling_weight: The sum of the absolute weights of terms of both signs, as in a policy gradient. It is the
            magnitude of such a loss, whose value is near 0 for any network.
    """

    never_negative: bool = False
    saturates: bool = False
    cancelling_weight: float = 0.0

    def both(self, other: LossTraits) -> LossTraits:
        """What holds for these losses and for others."""
        bounded, saturates = self.never_negative and other.never_negative, self.saturates and other.saturates
        return LossTraits(bounded, saturates, self.cancelling_weight + other.cancelling_weight)
