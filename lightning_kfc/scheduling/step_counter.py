"""The number of the present optimizer step."""

from __future__ import annotations


class StepCounter:
    """Counts optimizer steps; a step ends with its optimizer's step, and the next one begins at a forward.

    Attributes:
        number: The present step, counted from 0.
        over: Whether its optimizer has stepped.
        again: Whether an optimizer evaluates its closure once more in the same step.
    """

    def __init__(self) -> None:
        self.number = 0
        self.over = self.again = False

    @property
    def any_made(self) -> bool:
        """Whether an optimizer step has been made; from then on, no problem stops the training."""
        return self.over or self.number > 0

    @property
    def next(self) -> int:
        """The number of the step of the next forward."""
        return self.number + int(self.over)

    def begin(self) -> bool:
        """Begin the next step, if the present one is over.

        Returns:
            Whether a step begins.
        """
        self.number, begins, self.over = self.next, self.over, False
        return begins

    def end(self) -> None:
        """Note that the optimizer has stepped."""
        self.over = True

    def reopen(self) -> None:
        """Continue the present step, whose optimizer evaluates its closure once more."""
        self.over, self.again = False, True

    def restart(self, number: int) -> None:
        """Continue from a step that has not begun."""
        self.number, self.over = number, False
