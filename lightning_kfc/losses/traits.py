"""What is known of the losses of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossTraits:
    """What holds for all losses of a step.

    Attributes:
        never_negative: Whether they are bounded by 0.
        saturates: Whether their curvature falls to 0 with them.
        added: The sum of the positive weights of their recognised terms.
        subtracted: The sum of the absolute values of the negative ones.
    """

    never_negative: bool = False
    saturates: bool = False
    added: float = 0.0
    subtracted: float = 0.0

    @property
    def cancelling_weight(self) -> float:
        """The sum of absolute weights if terms have both signs, as in a policy gradient; else 0.

        It is the magnitude of such a loss, whose value may be near 0 for any network.
        """
        return self.added + self.subtracted if self.added and self.subtracted else 0.0

    def both(self, other: LossTraits) -> LossTraits:
        """What holds for these losses and for others."""
        bounded, saturates = self.never_negative and other.never_negative, self.saturates and other.saturates
        return LossTraits(bounded, saturates, self.added + other.added, self.subtracted + other.subtracted)
