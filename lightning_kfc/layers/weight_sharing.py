"""Weight sharing: several rows or one row for the uses of a weight by one example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_kfc.factors.statistics import InputStatistic, rows_cancel, second_moment_diagonal, share_by_reduction
from lightning_kfc.monitoring.messages import inform

#: With fewer examples, rows may cancel by chance.
ENOUGH_EXAMPLES = 4


@dataclass(frozen=True)
class BothForms:
    """The statistic of A from reduced and from expanded rows, before the test of cancellation."""

    reduced: InputStatistic
    expanded: InputStatistic


class WeightSharing:
    """The weight sharing of one layer; ``"reduce"`` becomes ``"expand"`` if an example's rows cancel.

    Args:
        mode: ``"expand"``: one row per use of the weight; ``"reduce"``: one row per example.
        layer: The layer's name, for the message.
        reason: The reason for another mode than the setting's; else empty.

    Attributes:
        mode: The present mode.
        reason: The reason for another mode than the setting's; else empty.
    """

    def __init__(self, mode: str, layer: str, reason: str = "") -> None:
        self.mode, self.reason = mode, reason
        self._layer = layer
        self._tested = False

    @property
    def reduces(self) -> bool:
        """Whether an example has one row, the mean of its rows."""
        return self.mode == "reduce"

    @property
    def untested(self) -> bool:
        """Whether rows are reduced, and untested for cancellation."""
        return self.reduces and not self._tested

    def shared(self, record: InputStatistic | BothForms, rows: Tensor) -> tuple[InputStatistic, Tensor]:
        """The statistic of A and the output rows of a call, in the present mode.

        Args:
            record: The statistic of A; in both forms if the mode was :attr:`untested` in the forward.
            rows: The output rows, one per use of the weight.
        """
        reduced = share_by_reduction(rows, average=False) if self.reduces else rows
        if isinstance(record, InputStatistic):
            return record, reduced
        if self.reduces:
            self._test(record, rows, reduced)
        return (record.reduced, reduced) if self.reduces else (record.expanded, rows)

    def _test(self, record: BothForms, rows: Tensor, reduced: Tensor) -> None:
        """Test once, with enough examples, whether rows cancel in their sum; if so, expand from now on."""
        squares = second_moment_diagonal(rows)
        examples, positions = rows.shape[:2]
        if examples < ENOUGH_EXAMPLES or positions < 2 or not bool(squares.any()):
            return
        self._tested = True
        means = record.expanded.rows / max(1, record.reduced.rows)
        sides = {
            "inputs": rows_cancel(_diagonal(record.reduced.total) * means**2, _diagonal(record.expanded.total)),
            "derivatives": rows_cancel(second_moment_diagonal(reduced), squares),
        }
        cancelling = [side for side, cancels in sides.items() if cancels]
        if cancelling:
            self.mode = "expand"
            self.reason = f"shared by 'expand': its {' and '.join(cancelling)} cancel over an example's positions"
            inform(f"KFC: layer {self._layer!r} is {self.reason}.")


def _diagonal(total: Tensor) -> Tensor:
    return total.diagonal(dim1=-2, dim2=-1) if total.ndim == 3 else total
