"""What happened, as numbers; reading them changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields

from lightning_kfc import distributed


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names in quotes, for a message; many are cut short."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:most]) + (f" and {len(quoted) - most} more" if len(quoted) > most else "")


@dataclass
class Events:
    """Counts of what went other than planned, over the whole training.

    Attributes:
        nonfinite_gradients: Steps whose gradients held a NaN or an infinity: no statistics were taken over, nothing
            was preconditioned, and the callback had the optimizer skip the step.
        nonfinite_statistics: Steps in which a layer's statistics held a NaN or an infinity, and entered no average.
        empty_statistics: Steps in which a layer saw no examples, which entered no average.
        missing_second_moments: Layers, summed over steps, that kept their eigenvalues, since ``inverse="ekfac"`` had no
            usable gradients of single examples.
        failed_factorisations: Factorisations that failed at every damping; the last good inverse was kept.
        restored_inverses: Steps in which a layer went back to its last good inverse, since the update by
            its new one was not finite, or not a descent direction.
        nonfinite_updates: Steps in which a layer kept its plain gradient, since no inverse gave a usable update.
        undone_steps: Steps that made the loss of their own batch larger, and were taken back.
        restarted_layers: Layers whose averages started anew, since their trainable parameters changed.
    """

    nonfinite_gradients: int = 0
    nonfinite_statistics: int = 0
    empty_statistics: int = 0
    missing_second_moments: int = 0
    failed_factorisations: int = 0
    restored_inverses: int = 0
    nonfinite_updates: int = 0
    undone_steps: int = 0
    restarted_layers: int = 0

    def count(self, event: str) -> int:
        """Add one to a count, and give the new one."""
        setattr(self, event, getattr(self, event) + 1)
        return int(getattr(self, event))

    def report(self, event: str, step: int, what: str) -> None:
        """Count an event; warn of the first one of its kind, on rank zero."""
        if self.count(event) == 1 and distributed.rank() == 0:
            warnings.warn(f"KFC at step {step}: {what}. More of this is only counted, in `kfc.events`.", stacklevel=3)

    def __str__(self) -> str:
        """What happened, for a report; empty where all went as planned."""
        return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in self.state_dict().items() if count)

    def state_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over counts by name; unknown names are left out."""
        for field in fields(self):
            if field.name in state:
                setattr(self, field.name, int(state[field.name]))


@dataclass(frozen=True)
class StepNumbers:
    r"""The numbers of the last preconditioned step.

    Attributes:
        step: Its number, from 0.
        damping: :math:`\lambda` in force.
        kl_clip_factor: :math:`\nu` of E7.
        kl_clip: :math:`\kappa` in force; None for no bound.
        kl: Half of :math:`\alpha^2\langle V,\nabla\bar W\rangle` before clipping, the KL of the step.
        reduction_ratio: Of the last reviewed step, the change of the loss over the change that was expected; None where
            none was.
    """

    step: int
    damping: float
    kl_clip_factor: float
    kl: float
    kl_clip: float | None = None
    reduction_ratio: float | None = None

    def as_metrics(self) -> dict[str, float]:
        """The numbers under the names that loggers show."""
        numbers = {
            "kfc/damping": self.damping,
            "kfc/kl_clip_factor": self.kl_clip_factor,
            "kfc/kl": self.kl,
            "kfc/kl_clip": self.kl_clip,
            "kfc/reduction_ratio": self.reduction_ratio,
        }
        return {name: value for name, value in numbers.items() if value is not None}
