"""The sources of statistics, with one line of information for each new mixture."""

from __future__ import annotations

from collections.abc import Sequence, Set

from lightning_kfc.estimation.back_propagation import gradient_norm
from lightning_kfc.estimation.recording import Call
from lightning_kfc.estimation.rest import Rest
from lightning_kfc.losses.selection import THE_REST, curvature_line
from lightning_kfc.losses.terms import LossTerm
from lightning_kfc.monitoring.events import listed
from lightning_kfc.monitoring.messages import inform


class Sources:
    """Holds the sources of the last statistics, and logs each mixture once.

    Attributes:
        last: Names of loss functions, of the rest, or of the whole loss.
    """

    def __init__(self) -> None:
        self.last: list[str] = []
        self._logged: set[tuple[str, ...]] = set()
        self._logged_functions: set[str] = set()

    def note(
        self,
        functions: Sequence[str],
        terms: Sequence[LossTerm],
        rest: Rest | None,
        calls: Sequence[Call],
        step: int,
    ) -> None:
        """Note the sources of statistics; log each new mixture with its shares of the gradient.

        Args:
            functions: The loss functions that count, in the order of their calls.
            terms: All terms that the loss holds.
            rest: The rest of the loss if its gradient counts; else None.
            calls: The recorded calls of layers, at whose outputs gradients are compared.
            step: The optimizer step.
        """
        names = list(dict.fromkeys(functions))
        self.last = names + [THE_REST] * (rest is not None)
        if tuple(self.last) in self._logged:
            return
        self._logged.add(tuple(self.last))
        norms = dict.fromkeys(self.last, 1.0)
        if rest is not None:
            norms = dict.fromkeys(self.last, 0.0)
            norms[THE_REST] = gradient_norm(rest.seeds(), calls)
            for name, seeds in rest.of_functions():
                norms[name] += gradient_norm(seeds, calls)
        inform(f"KFC at step {step}: {curvature_line(norms, terms)}")

    def report_used_up(self, functions: Set[str], step: int) -> None:
        """Log once each custom autograd function whose saved tensors were restored."""
        if new := sorted(functions - self._logged_functions):
            self._logged_functions.update(new)
            inform(
                f"KFC at step {step}: the backward of the custom autograd functions {listed(new)} clears their saved "
                "tensors; KFC restores them after its own back-propagations."
            )
