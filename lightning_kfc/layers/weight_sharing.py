"""Whether the uses of a weight by one example are several rows, or one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_kfc.factors.statistics import InputStatistic, rows_cancel, second_moment_diagonal, share_by_reduction
from lightning_kfc.monitoring.messages import inform

#: With fewer examples, rows may cancel by chance.
ENOUGH_EXAMPLES = 4


@dataclass(frozen=True)
class BothForms:
    """The statistic of A from reduced and from expanded rows, until it is known which of both serves."""

    reduced: InputStatistic
    expanded: InputStatistic


class WeightSharing:
    """How the weight of one layer is shared; ``"reduce"`` becomes ``"expand"`` where an example's rows cancel.

    Args:
        mode: ``"expand"``: one row per use of the weight; ``"reduce"``: one row per example.
        layer: The layer's name, for the message.
        reason: Why the mode is another one than the setting; empty where it is the setting's.

    Attributes:
        mode: The present one.
        reason: Why it is another one than the setting; empty where it is the setting's.
    """

    def __init__(self, mode: str, layer: str, reason: str = "") -> None:
        self.mode, self.reason = mode, reason
        self._layer = layer
        self._tested = False

    @property
    def reduces(self) -> bool:
        """Whether the mean of an example's rows is its one row."""
        return self.mode == "reduce"

    @property
    def untested(self) -> bool:
        """Whether rows are reduced that may cancel."""
        return self.reduces and not self._tested

    def shared(self, record: InputStatistic | BothForms, rows: Tensor) -> tuple[InputStatistic, Tensor]:
        """The statistic of A and the output rows of a call, as the weight is shared.

        Args:
            record: The statistic of A; in both forms if the sharing was :attr:`untested` in the forward.
            rows: The output rows, one per use of the weight.
        """
        reduced = share_by_reduction(rows, average=False) if self.reduces else rows
        if isinstance(record, InputStatistic):
            return record, reduced
        if self.reduces:
            self._test(record, rows, reduced)
        return (record.reduced, reduced) if self.reduces else (record.expanded, rows)

    def _test(self, record: BothForms, rows: Tensor, reduced: Tensor) -> None:
        """Expand from now on where an example's rows cancel in their sum; once there are enough examples."""
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
