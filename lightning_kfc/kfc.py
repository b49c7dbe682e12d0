"""The preconditioner: one training step, top to bottom, without Lightning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.curvature.coverage import Coverage, coverage_of, without_curvature
from lightning_kfc.curvature.gradients import gradients_of
from lightning_kfc.curvature.model_layers import ModelLayers
from lightning_kfc.curvature.optimizer_step import OptimizerStep
from lightning_kfc.distributed.process_group import ProcessGroup
from lightning_kfc.engine.batches import Batches
from lightning_kfc.engine.refreshes import Refreshes
from lightning_kfc.engine.stages import Stages
from lightning_kfc.factors.inverses import INVERSES
from lightning_kfc.monitoring.events import StepNumbers
from lightning_kfc.monitoring.messages import inform
from lightning_kfc.rules.base import Inspection
from lightning_kfc.rules.update_exchange import received_updates
from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.settings import Options, Settings, settings_of
from lightning_kfc.trust_region.outcome import Verdict
from lightning_kfc.utilities.isolation import full_precision


class KFC:
    """Kronecker-factored preconditioning of a model's gradients (Grosse & Martens 2016, arXiv:1602.01407).

    In a plain loop::

        kfc = KFC(model)
        with kfc.capture():
            loss = loss_fn(model(x), y)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()

    With ``kl_clip="auto"``, the callback's default, also after the step::

        kfc.review(optimizer=optimizer)

    Args:
        model: The model. Modules that are added or replaced later are found at the next step that takes statistics.
        process_group: The ranks that split a batch; None for all. With tensor-parallel ranks it is the data-parallel
            group of the mesh.
        settings: Checked settings, which ``options`` replace in part; None for the defaults.
        options: The options of :class:`~lightning_kfc.settings.Settings`, by name.

    Raises:
        TypeError: If a setting is of the wrong type, or there is no such setting; for a setting of an earlier version
            the message has its replacement.
        ValueError: If a setting is out of range, a pattern matches nothing, or no layer is left to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        process_group: Any = None,
        settings: Settings | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._model, self._group = model, ProcessGroup(process_group)
        #: The user's settings; :attr:`settings` are those in force, with the chosen rule.
        self.given_settings = settings_of("KFC", settings, options)
        #: If set, called at each step with the layers, their gradients and their updates; both may be views.
        self.inspect: Inspection | None = None
        self._start()

    def _start(self) -> None:
        self._stages = stages = Stages(self._model, self.given_settings, self._group)
        self.settings, self.rule_choice = stages.settings, stages.rule_choice
        self.events, self.communication = stages.events, stages.communication
        #: The time of steps by phase; runs only between its own begin_step() and end_step().
        self.times = stages.times
        #: Holds damping and bound in force, and reviews steps.
        self.reviewer = stages.reviewer
        #: Records the batches of a step.
        self.batches = Batches(stages)
        #: Refreshes factors and inverses.
        self.refreshes = Refreshes(stages)
        self.last_step: StepNumbers | None = None

    def restart(self) -> None:
        """Forget all state except ``inspect``, and find the layers again."""
        self.batches.resume()
        self._start()

    @property
    def layers(self) -> ModelLayers:
        """The preconditioned layers by module name."""
        return self._stages.layers

    @property
    def schedule(self) -> RefreshSchedule:
        """The dates of statistics and inverses; a period ``"auto"`` has its default until it is chosen."""
        return self._stages.periods.schedule

    @property
    def step(self) -> int:
        """The number of the present optimizer step, counted from 0."""
        return self._stages.steps.number

    @property
    def damping(self) -> float:
        """The damping in force at this step."""
        return self.reviewer.regions.damping_at(self.step)

    @property
    def kl_clip(self) -> float | None:
        """The bound on the squared norm of this step; None for no bound."""
        return self.reviewer.regions.kl_clip

    def coverage(self) -> Coverage:
        """Every parameter with its treatment and the reason; before the first step, the planned treatment."""
        # The last update is kept for its slope on the next batch.
        kept = self._stages.rule.moments_per_parameter + self.reviewer.region.adapts_radius
        idle = without_curvature(self.layers.values()) if self._stages.steps.any_made else {}
        return coverage_of(self._model, self.layers, INVERSES[self.settings.inverse], kept, idle)

    def ages(self, layer: str) -> tuple[int | None, int | None]:
        """Steps since the last refresh of a layer's statistics and of its inverse; None without one."""
        return self._stages.tracker.ages(layer, self.step)

    # A step, in the order of its parts.

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record the forward and the loss of this (micro-)batch if the step is due; else do nothing.

        Compute the loss inside this context. Compiled code runs eagerly inside.
        """
        self._begin_step_if_over()
        tracker = self._stages.tracker
        recorded = tracker.statistics_due(self.step) or tracker.recorded_at(self.step, self.layers)
        if recorded and self.batches.losses == 0 and (changed := self.follow_structure()):
            inform(changed)
        self._stages.require_agreement()
        with self.batches.capture():
            yield

    def _begin_step_if_over(self) -> None:
        if self._stages.steps.begin():
            self.batches.step_begins()
            self._stages.choose_periods()
        self._stages.follow_frozen()

    def follow_structure(self) -> str | None:
        """Find modules and parameters that were added, replaced or removed; other layers keep their state.

        :meth:`capture` calls it at each step that takes statistics. Collective: call on every rank.

        Returns:
            A description of the changes; None without any.
        """
        return self._stages.follow_structure()

    def update(
        self, loss: Tensor, *, accumulate: bool = False, loss_scale: float = 1.0, loss_fraction: float = 1.0
    ) -> None:
        """Take the statistics of this loss, and refresh factors and inverses if due. Call it before backward.

        Args:
            loss: The scalar whose backward follows.
            accumulate: Whether more micro-batches of the same optimizer step follow; factors and inverses are
                refreshed at the last one.
            loss_scale: The gradient scaler's factor on ``loss``.
            loss_fraction: The share of ``loss`` in the optimizer step, 1/k with k accumulated micro-batches; used with
                ``output_of``, or for a loss without a recognised term.

        Raises:
            LossNotRecognisedError: If the loss has no term of the given ``likelihood``.
            SelfTestError: If the rows of a layer do not rebuild its gradient.
            RuntimeError: If the step is due and its loss was not computed inside :meth:`capture`, or its
                backward has run.

        After the first optimizer step only a missing :meth:`capture` is an error. Other problems are counted in
        :attr:`events`, and their statistics left out.
        """
        self.batches.require_capture()
        self.back_propagate(loss, loss_scale=loss_scale, loss_fraction=loss_fraction)
        if not accumulate:
            self.refresh()

    def back_propagate(self, loss: Tensor, *, loss_scale: float = 1.0, loss_fraction: float = 1.0) -> None:
        """The first half of :meth:`update`: back-propagate the seeds, before the loss's backward."""
        self.batches.back_propagate(loss, loss_scale=loss_scale, loss_fraction=loss_fraction)

    def refresh(self, optimizer: Optimizer | None = None) -> None:
        """The second half of :meth:`update`: fold the statistics into the factors, and refresh inverses.

        Args:
            optimizer: The optimizer whose layers are refreshed; None for all layers.
        """
        self.refreshes(self.layers.stepped_by(optimizer))

    def precondition(
        self,
        lr: float | None = None,
        *,
        optimizer: Optimizer | None = None,
        loss_scale: float = 1.0,
        loss_gradients: Mapping[int, Tensor] | None = None,
    ) -> bool:
        """Replace the gradients of the covered parameters by their updates.

        If a gradient is not finite, all gradients stay, pending statistics are dropped, and the step is not counted.

        Args:
            lr: The learning rate of this step, for the KL clip. The rule "adam" then removes no momentum.
            optimizer: Instead of ``lr``: the optimizer. Only the gradients of its parameters are replaced.
            loss_scale: A gradient scaler's factor on the gradients, which the updates keep (fused optimizers unscale).
            loss_gradients: The loss's gradient, by the ``id`` of a parameter, if another engine has replaced it.

        Returns:
            Whether all gradients were finite. If not, skip the optimizer's step.

        Raises:
            ValueError: If neither ``lr`` nor ``optimizer`` is given, or both are.
        """
        coming = OptimizerStep.of(self.layers, lr, optimizer, loss_scale, loss_gradients)
        # No recording until the end of the step, which is no part of a loss.
        self.reviewer.pause()
        with self.times.phase("preconditioning"):
            if not self.refreshes.before_step(coming.parameters, coming.rates):
                self.batches.abandon(coming.rates)
                self.events.count("nonfinite_gradients")
                return False
            with torch.no_grad(), full_precision(self._model):
                self._replace_gradients(coming)
        self._step_over(optimizer)
        return True

    def _replace_gradients(self, coming: OptimizerStep) -> None:
        stages, regions, step, damping = self._stages, self.reviewer.regions, self.step, self.damping
        known = {name: own for name, trained in coming.trained.items() if (own := gradients_of(trained)) is not None}
        gradients = {self.layers[name]: own for name, own in known.items()}
        stages.pending.before_step(gradients, step)
        ready = received_updates(stages.ownership, stages.rule.ready(gradients, coming), damping)
        # SAM's second gradient, at other weights than those after the last step, does not measure that step.
        first = not stages.steps.again
        most_decrease = self.reviewer.note_step_loss(coming, stages.estimator.traits, first=first)
        if first:
            regions.follow_next_slope({entry.layer.name: entry.gradient for entry in ready})
        kl_clip = self.kl_clip
        updates = stages.rule.updates(ready, damping, kl_clip, most_decrease)
        if first:
            stages.rule.shrink_momentum(ready, regions.follow_rates(coming.rates), coming.optimizer)
            regions.keep_update({e.layer.name: e.learning_rate for e in ready}, updates.tensors, updates.slope)
        # Before the updates are written: .grad is still the gradient of the loss.
        self.reviewer.before_step(step, updates.quadratic, damping, coming)
        if self.inspect is not None:
            self.inspect(ready, updates.tensors)
        stages.rule.write(ready, updates, coming.optimizer, coming.loss_scale, step, self.events)
        numbers = StepNumbers(step, damping, updates.clip, updates.quadratic / 2, kl_clip)
        self.last_step = numbers if self.reviewer.last is None else self.reviewer.last.added_to(numbers)

    def _step_over(self, optimizer: Optimizer | None) -> None:
        self._stages.steps.end()
        self.reviewer.stepped(self.layers.parameters(optimizer), optimizer)

    def skip(self, optimizer: Optimizer) -> None:
        """Count an optimizer's step without :meth:`precondition`, and drop the statistics of its layers."""
        self.batches.skip(self.layers.stepped_by(optimizer))
        self._step_over(optimizer)

    def reopen_step(self) -> None:
        """Treat the next forward as a part of the last preconditioned step.

        Call it when an optimizer evaluates its closure again before its step, as SAM does.
        """
        self._stages.steps.reopen()

    def review(self, *, optimizer: Optimizer | None = None) -> Verdict | None:
        """Compare the optimizer's step with the expected decrease of the loss, and adjust the KL clip.

        Call it after the step, for ``kl_clip="auto"``. At the few reviewed steps :meth:`capture` has recorded the
        forward as tensor operations, which are replayed with the new weights; no user code runs again. A step with
        much less decrease than expected is shortened to the best point on its way, or undone if none is better.

        Args:
            optimizer: The optimizer that made the step; its momentum is shortened with the step.

        Returns:
            The verdict; None if no review was due.
        """
        with self.times.phase("reviews"):
            verdict = self.reviewer.review(self.layers.values(), optimizer)
        self.reviewer.resume()
        self._stages.steps.again = False
        if verdict is not None and verdict.undo:
            self._stages.rule.forget_momentum([self.layers[name] for name in self.layers.stepped_by(optimizer)])
        if verdict is not None and verdict.refresh:
            self._stages.tracker.refresh_soon(self.layers, self.step + 1)
        return verdict

    # State.

    def state_dict(self, *, factors: bool = True) -> dict[str, Any]:
        """The state for a resumed run, as plain tensors, numbers, strings, dicts and lists.

        Collective: call on every rank, and save the result of the first one. With a ``placement`` other than
        ``"comm-opt"`` only that one has the state of all layers. A run on any number of ranks can load it.

        Args:
            factors: Whether to include factors and inverses. Without them the state is small, and a resumed run
                repeats the warm-up.
        """
        return self._stages.state_dict(factors=factors)

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load a state; layers that do not fit start anew.

        Args:
            state: From :meth:`state_dict`, with tensors on any device.

        Returns:
            A sentence for each layer of the state or of the model that was not loaded.

        Raises:
            ValueError: If the state has a version that cannot be loaded.
        """
        self.batches.abandon(self.layers)
        return self._stages.load_state_dict(state)
