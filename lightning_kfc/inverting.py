"""Refreshes the inverses of layers: when they are due or beside the training, and not where nothing has moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from lightning_kfc import distributed
from lightning_kfc.background import Background, Job, used_by_training
from lightning_kfc.due import Due
from lightning_kfc.exchange import Exchange
from lightning_kfc.factors.inverse import INVERSES, Inverse
from lightning_kfc.held import Unmoved
from lightning_kfc.layer import Layer
from lightning_kfc.monitor import Events
from lightning_kfc.origin import Snapshot
from lightning_kfc.settings import Settings

#: The step, counted from the one at which it is due, from which an inverse that was made beside the training is used.
#: A fixed number, whenever it is ready: runs are reproducible, and all ranks change over together.
TAKEN_OVER_AFTER = 1


class Inverting:
    """Refreshes inverses, where due.

    The rank that makes an inverse decides whether to, since ranks that hold equal factors may round differently.

    Args:
        settings: The kind of inverse, and when to do without a new one.
        due: When each layer is due; told what was done.
        events: Counts what goes other than planned.
        exchange: Knows which rank holds what.
        say: Takes a line that tells how the first inverses get on, where they take long.

    Attributes:
        skipped: How many inverses, that were due, were not refreshed, since their layers had not moved enough.
    """

    def __init__(
        self, settings: Settings, due: Due, events: Events, exchange: Exchange, say: Callable[[str], None]
    ) -> None:
        self._chosen = INVERSES[settings.inverse]
        self._tolerance = settings.inverse_tolerance
        self._beside = settings.background_inverses
        self._background = Background()
        self._due = due
        self._events = events
        self._exchange = exchange
        self._say: Callable[[str], None] | None = say
        self._jobs: dict[str, _Job] = {}
        self.skipped = 0

    def sends(self, layers: Iterable[str], step: int, damping: float) -> bool:
        """Whether a refresh of these layers at this step sends inverses between ranks."""
        known = self._exchange.layers
        return any(self._is_due(name, step, damping) or (name in known and _ripe(known[name], step)) for name in layers)

    def _is_due(self, layer: str, step: int, damping: float) -> bool:
        return self._due.has_statistics(layer) and self._due.inverse(layer, step, damping)

    def _due_of(self, layers: Sequence[Layer], step: int, damping: float) -> list[Layer]:
        return [
            layer
            for layer in layers
            if (layer.averages or not self._exchange.has_factors(layer)) and self._is_due(layer.name, step, damping)
        ]

    def at_once(self, layers: Sequence[Layer], step: int, damping: float) -> None:
        """Refresh the inverses that are due and cannot wait: with none in use, or after a step that went wrong."""
        due = self._due_of(layers, step, damping)
        if self._beside:
            due = [layer for layer in due if self._cannot_wait(layer)]
        if not due:
            return
        for layer in due:
            # One that is on its way was made from older factors.
            self._drop(layer)
            layer.coming = self._snapshot(layer, step, damping)
        # The later ones take as long, which is known by then.
        say, self._say = self._say, None
        self._take_over(due, step, self._exchange.inverters(due), self._made_now, say)

    def beside(self, layers: Sequence[Layer], step: int, damping: float) -> None:
        """Take over the inverses that were begun at an earlier step; then begin those that are due."""
        ripe = [layer for layer in layers if _ripe(layer, step)]
        if ripe:
            begun = {layer.name: self._jobs[layer.name].owner for layer in ripe if self._job_of(layer) is not None}
            self._take_over(ripe, step, {**self._exchange.inverters(ripe), **begun}, self._made_beside)
        if not self._beside:
            # Those that a state of a run with the other setting has brought.
            if ripe:
                self.join()
            return
        for name in [name for name in self._jobs if name not in self._exchange.layers]:
            del self._jobs[name]
        due = self._due_of(layers, step, damping)
        owners = self._exchange.inverters(due) if due else {}
        for layer in due:
            self._drop(layer)
            layer.coming = self._snapshot(layer, step, damping)
            self._due.factorised(layer.name, step, damping)
            job = None
            if self._exchange.inverts_here(owners[layer.name]) and not self._unmoved(layer):
                job = self._begin(layer)
            self._jobs[layer.name] = _Job(layer.coming, owners[layer.name], job)

    def join(self) -> None:
        """Wait for what runs beside the training, and end its thread; what it made is still taken over in its turn."""
        self._background.join()

    # What inverses are made from.

    def _snapshot(self, layer: Layer, step: int, damping: float) -> Snapshot:
        origin = layer.origin_of(damping) if self._tolerance > 0 and layer.averages else None
        return Snapshot(step, damping, dict(layer.averages), origin)

    def _cannot_wait(self, layer: Layer) -> bool:
        """Whether a layer has no inverse to use meanwhile, or was told to refresh it whatever it has."""
        return layer.inverse is None or self._due.refreshed_at(layer.name)[1] is None

    def _unmoved(self, layer: Layer) -> bool:
        """Whether the inverse in use will do for what is coming: a comparison that no NaN passes."""
        assert layer.coming is not None
        before, now = layer.origin, layer.coming.origin
        # A bad step has all inverses refreshed, and layers that start anew have no origin.
        if before is None or now is None or layer.inverse is None or self._due.refreshed_at(layer.name)[1] is None:
            return False
        of_damping = not layer.inverse_type(self._chosen).follows_damping
        return before.change_to(now, of_damping=of_damping) <= self._tolerance

    # How they are made.

    def _made_now(self, layer: Layer) -> Inverse | Unmoved:
        assert layer.coming is not None
        return Unmoved() if self._unmoved(layer) else layer.refreshed(self._chosen, layer.coming.damping)

    def _begin(self, layer: Layer) -> Job[Inverse]:
        assert layer.coming is not None
        snapshot, kind = layer.coming, layer.inverse_type(self._chosen)
        device = next(iter(layer.adapter.parameters().values())).device
        return self._background.begin(
            lambda: kind.factorise(layer.curvature_of(snapshot.averages), snapshot.damping), device
        )

    def _made_beside(self, layer: Layer) -> Inverse | Unmoved:
        """What the thread has made; after a resume it is made anew, by the thread as well, so that it rounds alike."""
        if self._unmoved(layer):
            return Unmoved()
        begun = self._job_of(layer)
        job = begun.job if begun is not None and begun.job is not None else self._begin(layer)
        made = job.result()
        for value in made.state().values():
            if isinstance(value, Tensor):
                used_by_training(value)
        # What the inverse in use has learnt, also meanwhile.
        return made.succeeding(layer.inverse)

    def _job_of(self, layer: Layer) -> _Job | None:
        """What was begun from what is coming, and from nothing else."""
        job = self._jobs.get(layer.name)
        return job if job is not None and job.snapshot is layer.coming else None

    def _drop(self, layer: Layer) -> None:
        layer.coming = None
        job = self._jobs.pop(layer.name, None)
        if job is not None and job.job is not None:
            job.job.drop()

    # What comes of them.

    def _take_over(
        self,
        layers: Sequence[Layer],
        step: int,
        owners: Mapping[str, int],
        make: Callable[[Layer], Inverse | Unmoved],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._exchange.communication.begin("inverses")
        results = self._exchange.refreshed(layers, make, lambda layer: layer.inverse_type(self._chosen), owners, say)
        for layer in layers:
            snapshot, result = layer.coming, results[layer.name]
            assert snapshot is not None
            self._drop(layer)
            if snapshot.step == step:
                self._due.factorised(layer.name, step, snapshot.damping)
            if isinstance(result, Unmoved):
                self.skipped += 1
                continue
            layer.factorised_at = snapshot.step
            if isinstance(result, Inverse):
                layer.take(result, snapshot.origin)
                continue
            self._events.count("failed_factorisations")
            kept = "the last good inverse is kept" if layer.inverse is not None else "its plain gradient is used"
            if distributed.rank() == 0:
                warnings.warn(f"KFC at step {step}, layer {layer.name!r}: {result}; {kept}.", stacklevel=2)


class _Job:
    """What was begun beside the training.

    Args:
        snapshot: What from.
        owner: The rank that makes it.
        job: The work; None on other ranks, and where there is none to do.
    """

    def __init__(self, snapshot: Snapshot, owner: int, job: Job[Inverse] | None) -> None:
        self.snapshot = snapshot
        self.owner = owner
        self.job = job


def _ripe(layer: Layer, step: int) -> bool:
    return layer.coming is not None and step >= layer.coming.step + TAKEN_OVER_AFTER
