"""How the weights of a loss's terms change when the loss is evaluated on a part of a batch: a mean, or a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: A mean gives a part the total weight of the whole, a sum gives it its share.
LAWS = ("mean", "sum")

#: By how much a total weight may differ from what a law says. The totals of masked terms, or of terms with class
#: weights, vary with the examples that are in a part; a factor of two is far more than they do in batches of some
#: dozens, and what differs by more (a loss over pairs of examples, say) follows neither law. A trial with at most a
#: quarter of a batch can then not be taken for both.
TOLERATED = 2.0


class NotDivisibleError(ValueError):
    """Why statistics cannot be taken from a part of a batch."""


@dataclass(frozen=True)
class TermOutline:
    """What is compared of a loss term.

    Attributes:
        function: The loss function's name.
        numel: The number of logits.
        weight: The sum of the weights c.
    """

    function: str
    numel: int
    weight: float


def law_of(whole: Sequence[TermOutline], part: Sequence[TermOutline], examples: int, batch: int) -> str | None:
    """Which law the terms of a loss follow.

    Args:
        whole: The terms of the loss of a batch.
        part: Those of the loss of some of its examples.
        examples: The number of these.
        batch: The number of examples in the batch.

    Returns:
        ``"mean"`` or ``"sum"``; None where all weights are 0 or not finite, so that nothing can be said.

    Raises:
        NotDivisibleError: If a part has other terms than the whole, or weights that follow no law.
    """
    if not whole:
        raise NotDivisibleError("no term of the loss is recognised, so that its scale on a part is not known")
    if [term.function for term in whole] != [term.function for term in part]:
        raise NotDivisibleError(
            f"a part of a batch gives other loss terms ({_listed(part)}) than the whole ({_listed(whole)})"
        )
    found = set()
    for of_whole, of_part in zip(whole, part, strict=True):
        if of_part.numel * batch != of_whole.numel * examples:
            raise NotDivisibleError(
                f"{of_whole.function} has {of_whole.numel} logits on {batch} examples but {of_part.numel} on "
                f"{examples} of them, which is not in proportion: its terms are not those of single examples"
            )
        law = _law_of_weights(of_whole, of_part, examples / batch)
        if law is not None:
            found.add(law)
    if len(found) > 1:
        raise NotDivisibleError("some loss terms are means over the batch, others are sums")
    return found.pop() if found else None


def _law_of_weights(whole: TermOutline, part: TermOutline, share: float) -> str | None:
    if not all(math.isfinite(term.weight) and term.weight > 0 for term in (whole, part)):
        return None
    ratio = part.weight / whole.weight
    distances = {"mean": abs(math.log(ratio)), "sum": abs(math.log(ratio / share))}
    law = min(distances, key=lambda name: distances[name])
    if distances[law] > math.log(TOLERATED):
        raise NotDivisibleError(
            f"the terms of {whole.function} weigh {ratio:.3g} times as much on a part of {share:.3g} of a batch as on "
            "the whole, which is neither a mean's 1 nor a sum's share"
        )
    return law


def _listed(terms: Sequence[TermOutline]) -> str:
    return ", ".join(term.function for term in terms) or "none"
