"""The layers that wait for the self-test, in a model that may change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.estimation.graph import loss_edge, uses
from lightning_kfc.estimation.random_streams import RandomStreams
from lightning_kfc.estimation.recording import Call
from lightning_kfc.estimation.self_test import SelfTest

#: A layer is tested again no more often than this: the uses of some weights change with the length of the input.
MOST_REPEATS = 3
#: The reason for no Kronecker factors of layers without other calls.
TRANSFORMED = "it is called inside a torch.func transform, whose calls cannot be recorded"


class SelfTestProgress:
    """Holds the self-test of a model's layers until every layer has passed or was dropped.

    Args:
        layers: The model's layers, which may change.
        streams: The source of the test's directions.
    """

    def __init__(self, layers: Mapping[str, Layer], streams: RandomStreams) -> None:
        self._layers = layers
        self._streams = streams
        self._test: SelfTest | None = None
        self._done = False
        # How often the loss used a layer's weights for each of its calls.
        self._uses: dict[str, set[float]] = {}

    @property
    def done(self) -> bool:
        """Whether every layer has passed or was dropped."""
        return self._done or (self._test is not None and self.running is None)

    @property
    def running(self) -> SelfTest | None:
        """The self-test while a present layer waits for its check."""
        test = self._test
        return test if test is not None and any(name in self._layers for name in test.waiting) else None

    def restart(self, *, done: bool) -> None:
        """End the self-test, or start it again at the next forward."""
        self._test, self._done = None, done

    def prepare(self, step: int, recorded: Iterable[str]) -> SelfTest | None:
        """The test of the coming forward; None when no layer is left to test.

        Args:
            step: The optimizer step.
            recorded: The names of the layers that are recorded in the forward.
        """
        if self.done:
            self.restart(done=True)
            return None
        if self._test is None:
            self._test = self._test_of(self._layers, step)
        self._test.recorded = set(recorded)
        return self._test

    def follow(self, kept: Mapping[str, str], new: Iterable[str], step: int) -> None:
        """Test new layers, and those that still wait; the arguments are those of :meth:`.Estimator.follow`."""
        self._uses = {kept[name]: seen for name, seen in self._uses.items() if name in kept}
        if self._test is None and not self._done:
            return
        waiting = {kept[name] for name in (self._test.waiting if self._test else ()) if name in kept}.union(new)
        names = [name for name in self._layers if name in waiting]
        self.restart(done=not layers_with_rows(self._layers, names))
        if not self._done:
            self._test = self._test_of(names, step)

    def follow_uses(self, loss: Tensor, calls: Sequence[Call], step: int) -> None:
        """Test layers once more whose weights a loss uses more or less often, for each of their calls, than before.

        A use outside the layer may have begun after its test.

        Args:
            loss: The loss.
            calls: The recorded calls of layers.
            step: The optimizer step.
        """
        number = Counter(call.layer for call in calls if call.layer in self._layers and call.adapter.has_rows)
        owners = {
            get_gradient_edge(parameter).node: name
            for name in number
            for parameter in self._layers[name].adapter.own_parameters().values()
        }
        found: Counter[str] = Counter()
        for node, count in uses(loss_edge(loss).node, owners).items():
            found[owners[node]] += count
        new = []
        for name, count in number.items():
            seen = self._uses.setdefault(name, {found[name] / count})
            if found[name] / count not in seen and len(seen) <= MOST_REPEATS:
                seen.add(found[name] / count)
                new.append(name)
        if new:
            waiting = [name for name in (self._test.waiting if self._test else ()) if name in self._layers]
            self._test, self._done = self._test_of(dict.fromkeys([*waiting, *new]), step), False
            # Further losses of this forward have no products with the new test's directions.
            self._test.recorded = set()

    def give_up(self, names: Collection[str]) -> None:
        """Stop testing the named layers."""
        if self._test is not None:
            self._test.waiting[:] = [name for name in self._test.waiting if name not in names]

    def concluded(self, test: SelfTest, transformed: Collection[str]) -> dict[str, str]:
        """Remove and return the outcome of a loss's test: by layer, why its rows do not explain its gradient.

        Args:
            test: The test.
            transformed: The layers with calls inside a ``torch.func`` transform.
        """
        own = {name: self._layers[name].adapter.unseen for name in test.never_called if name in self._layers}
        unseen = {name: TRANSFORMED if name in transformed else reason for name, reason in own.items()}
        unexplained = unseen | {n: why for n, why in test.unexplained.items() if n in self._layers}
        test.waiting[:] = [n for n in test.waiting if n in self._layers and n not in test.unexplained]
        test.never_called.clear()
        test.unexplained.clear()
        return unexplained

    def _test_of(self, names: Iterable[str], step: int) -> SelfTest:
        generator = self._streams.generator(step, 0, stream=1)(torch.device("cpu"))
        return SelfTest(layers_with_rows(self._layers, names), generator)


def layers_with_rows(layers: Mapping[str, Layer], names: Iterable[str]) -> dict[str, Layer]:
    """The named layers that have rows."""
    return {name: layers[name] for name in names if layers[name].adapter.has_rows}
