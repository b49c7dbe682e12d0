"""What happened, as numbers; reading them changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Events:
    """Counts of what went other than planned, over the whole training.

    Attributes:
        nonfinite_statistics: Steps whose statistics held a NaN or an infinity, and entered no average.
        nonfinite_gradients: Steps whose gradient held a NaN or an infinity, and was left as it was.
        nonfinite_updates: Layers, summed over steps, that kept their plain gradient since the update was not finite.
        missing_second_moments: Layers, summed over steps, that kept their eigenvalues, since ``inverse="ekfac"`` had no
            usable gradients of single examples.
        failed_factorisations: Factorisations that failed at every damping; the last good inverse was kept.
        restarted_layers: Layers whose averages started anew, since their trainable parameters changed.
    """

    nonfinite_statistics: int = 0
    nonfinite_gradients: int = 0
    nonfinite_updates: int = 0
    missing_second_moments: int = 0
    failed_factorisations: int = 0
    restarted_layers: int = 0

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
        kl: Half of :math:`\alpha^2\langle V,\nabla\bar W\rangle` before clipping, the KL of the step.
    """

    step: int
    damping: float
    kl_clip_factor: float
    kl: float

    def as_metrics(self) -> dict[str, float]:
        """The numbers under the names that loggers show."""
        return {
            "kfc/damping": self.damping,
            "kfc/kl_clip_factor": self.kl_clip_factor,
            "kfc/kl": self.kl,
        }
