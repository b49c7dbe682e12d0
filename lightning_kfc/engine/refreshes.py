"""Refresh factors and inverses from the statistics of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed.process_group import all_finite
from lightning_kfc.engine.stages import Stages
from lightning_kfc.utilities.isolation import full_precision


class Refreshes:
    """Refreshes factors and inverses, if they are due.

    Args:
        stages: The stages.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._factors, self._inverses, self._reviewer = stages.factors, stages.inverses, stages.reviewer

    def begin(self, optimizer: Optimizer) -> None:
        """Begin the sum of a step's statistics over ranks; the next refresh waits for it.

        Args:
            optimizer: The optimizer that steps the layers.
        """
        layers = self._stages.layers
        if self._factors.expects(layers):
            with full_precision(self._stages.model):
                self._factors.begin([layers[name] for name in layers.stepped_by(optimizer)])

    def if_finite(self, optimizer: Optimizer) -> None:
        """Refresh if statistics wait, unless a gradient is not finite and the step will be skipped.

        Args:
            optimizer: The optimizer that steps the layers.
        """
        layers = self._stages.layers
        # First, since it is cheap, and usually false: this runs after every backward.
        if not self._factors.expects(layers):
            return
        names = layers.stepped_by(optimizer)
        if self._factors.expects(names):
            self.before_step(layers.parameters(optimizer), names)

    def before_step(self, parameters: Sequence[nn.Parameter], names: Collection[str]) -> bool:
        """Refresh if due, unless a gradient is not finite. Collective: call on every rank.

        Args:
            parameters: The parameters of the step, preconditioned or not.
            names: The layers of the step.

        Returns:
            Whether all gradients are finite, on all ranks if messages follow.
        """
        stages, step = self._stages, self._stages.steps.number
        self._reviewer.regions.select(parameters)
        finite = all_finite([p.grad for p in parameters if p.grad is not None])
        # New statistics change the dates, which are then found after them.
        dated = None if self._factors.expects(names) else self._inverses.dated(names, step)
        # Most steps have nothing to refresh.
        due = dated is None or bool(self._inverses.outdated(dated, self._reviewer.regions.damping_at(step)))
        # If messages follow, all ranks must take part.
        if stages.group.size > 1 and (due or self._reviewer.region.adapts_radius):
            finite = stages.group.all_agree(finite, next(stages.model.parameters()).device)
        if finite and due:
            self._refresh(names, dated)
        self._reviewer.regions.give_unit()
        return finite

    def __call__(self, names: Collection[str]) -> None:
        """Fold the statistics of a step into the factors of layers, and refresh their inverses.

        With several optimizers, inverses wait for the step of their own, whose loss is the unit of their damping.
        """
        self._refresh(names, None, inverses=not self._reviewer.losses.of_several_optimizers)

    def _refresh(self, names: Collection[str], dated: Sequence[str] | None, *, inverses: bool = True) -> None:
        stages, step = self._stages, self._stages.steps.number
        layers = [stages.layers[name] for name in names]
        stages.estimator.recount({layer.name for layer in layers if layer.pending is not None})
        expected = self._factors.expects(names)
        try:
            with full_precision(stages.model):
                with stages.times.phase("statistics"):
                    folded = self._factors(layers, step)
                stages.layers.drop_all(folded.given_up)
                stages.pending.unseen.update(folded.unusable)
                if inverses:
                    dated = self._inverses.dated(names, step) if dated is None else dated
                    self._refresh_inverses(layers, dated, expected=expected)
                with stages.times.phase("statistics"):
                    # After the refresh, in the new basis.
                    moments = stages.estimator.examples.second_moments(layers)
                    self._factors.fold_second_moments(layers, step, moments)
        except Exception as error:
            # With several ranks, the others wait for messages of this rank, so it must not continue alone.
            if not stages.steps.any_made or stages.group.size > 1:
                raise
            stages.pending.leave_out({layer.name: error for layer in layers}, step)

    def _refresh_inverses(self, layers: Sequence[Layer], dated: Sequence[str], *, expected: bool) -> None:
        step, traits = self._stages.steps.number, self._stages.estimator.traits
        if expected or self._inverses.outdated(dated, self._reviewer.regions.damping_at(step)):
            self._reviewer.measure_units(layers, traits)
        damping = self._reviewer.regions.damping_at(step)
        # Before the first nonzero loss an automatic damping has no unit; the inverses stay due.
        if not math.isnan(damping):
            due = set(self._inverses.outdated(dated, damping))
            noise_damping = 0.0 if traits.saturates else self._reviewer.region.noise_damping
            with self._stages.times.phase("inverses"):
                self._inverses([layer for layer in layers if layer.name in due], step, damping, noise_damping)
