"""The numbers of a training: counts at every step, and more expensive numbers at logged steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from lightning_kfc.curvature.coverage import IDLE
from lightning_kfc.curvature.spectra import LayerSpectra, spectra_of
from lightning_kfc.kfc import KFC
from lightning_kfc.monitoring.advice import CUT_STEPS, Facts
from lightning_kfc.monitoring.timing import PHASES, REST
from lightning_kfc.rules.base import ReadyLayer

#: Measurements in a row below the damping after which a layer's curvature counts as below it.
LOOKS = 3
#: The numbers for loggers without ``logging.layers``.
LOGGED = (
    "kfc/kl_clip_factor",
    "kfc/clipped_share",
    "kfc/kl_clip",
    "kfc/damping",
    "kfc/reduction_ratio",
    "kfc/cosine",
    "kfc/update_to_weight_max",
    "kfc/overhead",
    "kfc/nonfinite_events",
    "kfc/undone_steps",
)
#: The events that `kfc/nonfinite_events` adds up.
NONFINITE = ("nonfinite_gradients", "nonfinite_statistics", "nonfinite_updates", "restored_inverses")
#: The phases of a step in keys.
OURS = PHASES[:-1]


@dataclass
class _Looked:
    """Numbers of the layers at the last inspected step."""

    cosine: float = math.nan
    by_layer: dict[str, dict[str, float]] = field(default_factory=dict)


class Diagnostics:
    """Collects the numbers of a fit.

    Call :meth:`begin_step` before each :meth:`~lightning_kfc.KFC.precondition`, :meth:`end_step` after it, and
    :meth:`numbers` at logged steps. With sharded parameters, collective: call on every rank.

    Args:
        kfc: The engine.
        layers: Whether to collect numbers of each layer, besides the smallest, the median and the largest one.
    """

    def __init__(self, kfc: KFC, *, layers: bool = False) -> None:
        self._kfc = kfc
        self._each_layer = layers
        self._looked = _Looked()
        self._spectra: dict[str, tuple[int, LayerSpectra]] = {}
        self._looks: deque[set[str]] = deque(maxlen=LOOKS)
        self._clip_factors: deque[float] = deque(maxlen=CUT_STEPS)
        self._steps = self._steps_since = self._cut_since = 0
        self._last_seconds: dict[str, float] = {}
        self._first_seconds: dict[str, float] | None = None
        self._first_timed = 0
        self._first_events = kfc.events.state_dict()

    # Around a step.

    def begin_step(self, *, look: bool) -> None:
        """Begin a step, before it is preconditioned.

        Args:
            look: Whether a call of :meth:`numbers` follows the step.
        """
        kfc = self._kfc
        kfc.inspect = self._inspect if look else None
        # The shares of time in the warm-up, which refreshes at nearly every step, are not typical.
        if self._first_seconds is None and kfc.step > kfc.settings.warmup_steps:
            self._first_seconds, self._first_timed = kfc.times.seconds(), kfc.times.steps

    def end_step(self) -> None:
        """End a step, after it was preconditioned."""
        kfc = self._kfc
        kfc.inspect = None
        if kfc.last_step is None:
            return
        factor = kfc.last_step.kl_clip_factor
        self._clip_factors.append(factor)
        self._steps += 1
        self._steps_since += 1
        self._cut_since += factor < 1

    def _inspect(self, ready: Sequence[ReadyLayer], updates: Sequence[Tensor]) -> None:
        self._looked = _Looked()
        if not ready:
            return
        sums = torch.stack([_sums(entry, update) for entry, update in zip(ready, updates, strict=True)]).tolist()
        products, squared_gradients, squared_updates = map(math.fsum, list(zip(*sums, strict=True))[:3])
        self._looked.cosine = _cosine(products, squared_gradients, squared_updates)
        for entry, (product, gradient, update, weights) in zip(ready, sums, strict=True):
            self._looked.by_layer[entry.layer.name] = {
                "cosine": _cosine(product, gradient, update),
                "update_to_weight": entry.learning_rate * math.sqrt(update / weights) if weights else math.nan,
            }
        self._look_at_factors()

    def _look_at_factors(self) -> None:
        kfc = self._kfc
        # The spectra change with the inverse only.
        new = {
            name: layer
            for name, layer in kfc.layers.items()
            if layer.averages and self._spectra.get(name, (None,))[0] != layer.factorised_at
        }
        for name, found in spectra_of(new, kfc.damping).items():
            self._spectra[name] = kfc.layers[name].factorised_at, found
        self._spectra = {name: entry for name, entry in self._spectra.items() if name in kfc.layers}
        below = {
            name
            for name, (_, found) in self._spectra.items()
            if found.largest_curvature < kfc.layers[name].damping(kfc.damping)
        }
        self._looks.append(below)

    # Results.

    def numbers(self) -> dict[str, float]:
        """The numbers of the last step under their names in loggers; empty before the first step."""
        kfc = self._kfc
        if kfc.last_step is None:
            return {}
        events = kfc.events.state_dict()
        found = {
            **kfc.last_step.as_metrics(),
            "kfc/clipped_share": self._cut_since / self._steps_since if self._steps_since else math.nan,
            "kfc/cosine": self._looked.cosine,
            "kfc/nonfinite_events": float(sum(events[name] for name in NONFINITE)),
            "kfc/undone_steps": float(events["undone_steps"]),
            "kfc/shortened_steps": float(events["shortened_steps"]),
            "kfc/bytes_held": float(bytes_held(kfc)),
            **self._ages(),
            **self._chosen_periods(),
            **self._shares_since(),
            **self._layers(),
        }
        self._steps_since = self._cut_since = 0
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _ages(self) -> dict[str, float]:
        ages = [self._kfc.ages(name) for name in self._kfc.layers]
        found = {
            "kfc/factor_age": [factors for factors, _ in ages if factors is not None],
            "kfc/inverse_age": [inverse for _, inverse in ages if inverse is not None],
        }
        return {name: float(max(part)) for name, part in found.items() if part}

    def _chosen_periods(self) -> dict[str, float]:
        kfc = self._kfc
        if not kfc.settings.automatic_periods:
            return {}
        return {
            "kfc/factor_every_n_steps": float(kfc.schedule.factor_every_n_steps),
            "kfc/inverse_every_n_steps": float(kfc.schedule.inverse_every_n_steps),
        }

    def _shares_since(self) -> dict[str, float]:
        """The share of each phase in the time since the last call, in percent."""
        seconds = self._kfc.times.seconds()
        shares = _shares(seconds, self._last_seconds)
        self._last_seconds = seconds
        if not shares:
            return {}
        percent = {f"kfc/time_{part}": 100 * shares[part] for part in OURS}
        return {**percent, "kfc/overhead": 100 * (1 - shares[REST])}

    def _layers(self) -> dict[str, float]:
        by_layer = {name: dict(found) for name, found in self._looked.by_layer.items()}
        for name, (_, spectra) in self._spectra.items():
            by_layer.setdefault(name, {}).update(spectra.as_numbers())
        own = {f"kfc/{name}/{key}": value for name, found in by_layer.items() for key, value in found.items()}
        return {**summary(by_layer.values()), **(own if self._each_layer else {})}

    def facts(
        self, *, gradient_scaler: bool = False, gradient_clip_factors: Sequence[float] = (), momentum: float = 0.0
    ) -> Facts:
        """The facts for the rules of advice.

        Args:
            gradient_scaler: Whether a gradient scaler is in use.
            gradient_clip_factors: The factor of gradient clipping on each of the last updates.
            momentum: The highest momentum of an optimizer.
        """
        kfc = self._kfc
        trainable = [row for row in kfc.coverage() if row.treatment != "frozen"]
        rows = {name: e.rows for name, e in kfc.layers.items() if e.rows and e.adapter.treatment == "kfc"}
        fewest = min(rows, key=lambda name: rows[name], default="")
        started = self._first_seconds is not None
        full = len(self._looks) == LOOKS
        return Facts(
            steps=self._steps,
            clip_factors=tuple(self._clip_factors),
            kl_clip=kfc.kl_clip,
            automatic_kl_clip=kfc.settings.kl_clip == "auto",
            damping=kfc.damping,
            automatic_damping=kfc.settings.damping == "auto",
            damped=kfc.settings.rule != "adam",
            below_damping=tuple(name for name in kfc.layers if full and all(name in look for look in self._looks)),
            layers=len(kfc.layers),
            timed_steps=kfc.times.steps - self._first_timed if started else 0,
            time_shares=_shares(kfc.times.seconds(), self._first_seconds or {}) if started else {},
            factor_every_n_steps=kfc.schedule.factor_every_n_steps,
            inverse_every_n_steps=kfc.schedule.inverse_every_n_steps,
            undone_steps=self._events_since("undone_steps"),
            covered_parameters=sum(row.numel for row in trainable if row.treatment in ("kfc", "block")),
            # Another module or adapter would not help layers that only wait for statistics.
            trainable_parameters=sum(row.numel for row in trainable if row.reason not in IDLE),
            plain_parameters=sum(row.numel for row in trainable if row.treatment == "plain"),
            chosen_layers=kfc.settings.include is not None or kfc.settings.exclude is not None,
            nonfinite_steps=self._events_since("nonfinite_gradients"),
            gradient_scaler=gradient_scaler,
            gradient_clip_factors=gradient_clip_factors,
            momentum=momentum,
            fewest_rows=rows.get(fewest),
            layer_of_fewest_rows=fewest,
        )

    def _events_since(self, event: str) -> int:
        return self._kfc.events.state_dict()[event] - self._first_events[event]

    def count_from_here(self) -> None:
        """Count events from now on, without those in the checkpoint."""
        self._first_events = self._kfc.events.state_dict()


def summary(by_layer: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The smallest, the median and the largest number of all layers, by key."""
    columns: dict[str, list[float]] = {}
    for found in by_layer:
        for key, value in found.items():
            if math.isfinite(value):
                columns.setdefault(key, []).append(value)
    kinds: dict[str, Callable[[list[float]], float]] = {"min": min, "median": median, "max": max}
    return {f"kfc/{key}_{kind}": take(values) for key, values in columns.items() for kind, take in kinds.items()}


def bytes_held(kfc: KFC) -> int:
    """Bytes of factors, present and former inverses, Adam's moments and the last updates on this rank."""
    held = kfc.reviewer.regions.last_updates.nbytes()
    for layer in kfc.layers.values():
        held += sum(average.nbytes for average in layer.averages.values())
        held += sum(inverse.nbytes() for inverse in (layer.inverse, layer.previous_inverse) if inverse is not None)
        held += layer.moments.nbytes() if layer.moments is not None else 0
    return held


def _sums(entry: ReadyLayer, update: Tensor) -> Tensor:
    r""":math:`\langle V, \nabla\rangle, \|\nabla\|^2, \|V\|^2, \|W\|^2` of a layer, in float64 if available."""
    wide = torch.float32 if update.device.type == "mps" else torch.float64
    weights = entry.layer.matrix({role: p.detach() for role, p in entry.layer.trained_parameters().items()})
    norms = [torch.linalg.vector_norm(part).to(wide).square() for part in (entry.gradient, update, weights)]
    return torch.stack([torch.sum(update * entry.gradient).to(wide), *norms])


def _cosine(product: float, squared_a: float, squared_b: float) -> float:
    length = math.sqrt(squared_a) * math.sqrt(squared_b)
    return product / length if length else math.nan


def _shares(seconds: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """The share of each phase in the seconds since ``before``; empty if no time has passed."""
    passed = {part: taken - before.get(part, 0.0) for part, taken in seconds.items()}
    total = sum(passed.values())
    return {part: taken / total for part, taken in passed.items()} if total > 0 else {}
