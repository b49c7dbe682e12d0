"""The preconditioner: one training step, top to bottom. It knows no Lightning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_kfc.curvature.coverage import Coverage, coverage_of, without_curvature
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
from lightning_kfc.rules.ready import ready_layers
from lightning_kfc.rules.update_exchange import received_updates
from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.settings import Options, Settings, settings_of
from lightning_kfc.trust_region.region import Verdict
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

    With ``kl_clip="auto"``, which the callback has by default, this follows the step::

        kfc.review(optimizer=optimizer)

    Args:
        model: The model. Modules that are added or replaced later are found at the next step that takes statistics.
        process_group: The ranks between which a batch is split, where these are not all: the data-parallel group
            of a mesh that also has tensor-parallel ranks. It must be the same ranks' group on all of them.
        settings: Settings that were checked before; options that are given as well replace theirs. None for the
            defaults.
        options: Those of :class:`~lightning_kfc.settings.Settings`, by name.

    Raises:
        TypeError: If a setting is of the wrong type, or there is no such setting; for a setting of an earlier version
            the message names the way out.
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
        #: As they were given; :attr:`settings` are those in force, with the rule that was chosen.
        self.given_settings = settings_of("KFC", settings, options)
        #: Where set, called at each step with the layers, their gradients and their updates; both may be views.
        self.inspect: Inspection | None = None
        self._start()

    def _start(self) -> None:
        self._stages = stages = Stages(self._model, self.given_settings, self._group)
        self.settings, self.rule_choice = stages.settings, stages.rule_choice
        self.events, self.communication = stages.events, stages.communication
        #: Where the time of a step goes; runs only between its own begin_step() and end_step().
        self.times = stages.times
        #: Holds damping and bound in force, and reviews steps.
        self.reviewer = stages.reviewer
        #: Records the batches of a step.
        self.batches = Batches(stages)
        #: Refreshes factors and inverses.
        self.refreshes = Refreshes(stages)
        self.last_step: StepNumbers | None = None

    def restart(self) -> None:
        """Forget all that was estimated, counted and set since, but :attr:`inspect`; the layers are found anew."""
        self.batches.resume()
        self._start()

    @property
    def layers(self) -> ModelLayers:
        """The preconditioned layers by module name."""
        return self._stages.layers

    @property
    def schedule(self) -> RefreshSchedule:
        """When statistics and inverses are due; where a period is ``"auto"``, the default's until it is chosen."""
        return self._stages.periods.schedule

    @property
    def step(self) -> int:
        """The number of the present optimizer step, counted from 0."""
        return self._stages.steps.number

    @property
    def damping(self) -> float:
        """The damping in force at this step."""
        return self.reviewer.damping_at(self.step)

    @property
    def kl_clip(self) -> float | None:
        """The bound on the squared norm of a step in force at this step; None for none."""
        return self.reviewer.kl_clip

    def coverage(self) -> Coverage:
        """Every parameter with how it is treated now, and why; before the first step, how it will be."""
        inverse, moments = INVERSES[self.settings.inverse], self._stages.rule.moments_per_parameter
        idle = without_curvature(self.layers.values()) if self._stages.steps.any_made else {}
        return coverage_of(self._model, self.layers, inverse, moments, idle)

    def ages(self, layer: str) -> tuple[int | None, int | None]:
        """Steps since a layer's statistics, and its inverse, were last refreshed; None where they never were."""
        return self._stages.tracker.ages(layer, self.step)

    # A step, in the order of its parts.

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record what the forward and the loss of this (micro-)batch show, if this step is due; else do nothing.

        Compute the loss inside. Compiled code runs eagerly there, and only there.
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
            self.reviewer.step_begins()
            self._stages.choose_periods()

    def follow_structure(self) -> str | None:
        """Look for what was added to the model, replaced or taken away since; what is known of other layers stays.

        :meth:`capture` does so at each step that takes statistics. All ranks must do so at the same step.

        Returns:
            What has changed, in words; None where nothing has.
        """
        return self._stages.follow_structure()

    def update(
        self, loss: Tensor, *, accumulate: bool = False, loss_scale: float = 1.0, loss_fraction: float = 1.0
    ) -> None:
        """Take the statistics of this loss and refresh factors and inverses, where due. Call it before backward.

        Args:
            loss: The scalar whose backward follows.
            accumulate: Whether more micro-batches of the same optimizer step follow: factors and inverses then
                wait for the last of them.
            loss_scale: The factor that a gradient scaler has multiplied ``loss`` by.
            loss_fraction: The share of ``loss`` in the optimizer step, where the logits were named by
                ``output_of`` or no term is recognised: 1/k when k micro-batches are accumulated.

        Raises:
            LossNotRecognisedError: If the loss holds no term of the ``likelihood`` that was named.
            SelfTestError: If the first step shows that the rows of a layer do not explain its gradient.
            RuntimeError: If the step is due but its loss was not computed inside :meth:`capture`, or if its
                backward has been run.

        From the first optimizer step on, the missing :meth:`capture` alone is an error: what else cannot be used is
        left out, and counted in :attr:`events`.
        """
        self.batches.require_capture()
        self.back_propagate(loss, loss_scale=loss_scale, loss_fraction=loss_fraction)
        if not accumulate:
            self.refresh()

    def back_propagate(self, loss: Tensor, *, loss_scale: float = 1.0, loss_fraction: float = 1.0) -> None:
        """The first half of :meth:`update`: send the seeds to the layers while the loss's graph lives."""
        self.batches.back_propagate(loss, loss_scale=loss_scale, loss_fraction=loss_fraction)

    def refresh(self, optimizer: Optimizer | None = None) -> None:
        """The second half of :meth:`update`: fold what has been added up into the factors, and refresh inverses.

        Args:
            optimizer: Only of the layers that this optimizer steps; None for all.
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

        A step whose gradients are not all finite is left alone: its statistics enter no average where they still
        wait (:meth:`update` with ``accumulate=True``), its gradients stay as they are, and it is not counted as a step.

        Args:
            lr: The learning rate of this step, for the KL clip. The rule "adam" then knows of no momentum to take out.
            optimizer: Instead of ``lr``: the optimizer, each of whose parameter groups has a learning rate; only
                its own parameters' gradients are replaced.
            loss_scale: The factor by which the gradients are still multiplied, where a gradient scaler leaves
                unscaling to a fused optimizer. They are multiplied by it afterwards, too.
            loss_gradients: By the ``id`` of a parameter: the gradient of the loss, where another engine replaced it.

        Returns:
            Whether the gradients were finite. Where they were not, skip the step, as it would spoil the weights.

        Raises:
            ValueError: If neither ``lr`` nor ``optimizer`` is given, or both are.
        """
        coming = OptimizerStep.of(self.layers, lr, optimizer, loss_scale, loss_gradients)
        # Until the step is made: it is no part of a loss.
        self.reviewer.pause()
        with self.times.phase("preconditioning"):
            if not self.refreshes.gradients_finite(coming.parameters, coming.rates):
                self.batches.abandon(coming.rates)
                self.events.count("nonfinite_gradients")
                return False
            self.refreshes(coming.rates)
            with torch.no_grad(), full_precision(self._model):
                self._replace_gradients(coming)
        self._step_over(optimizer)
        return True

    def _replace_gradients(self, coming: OptimizerStep) -> None:
        stages, rule, step, damping, kl_clip = self._stages, self._stages.rule, self.step, self.damping, self.kl_clip
        layers = [self.layers[name] for name in coming.rates]
        gradients = {layer: own for layer in layers if (own := layer.gradients()) is not None}
        stages.pending.before_step(gradients, step)
        ready = received_updates(stages.ownership, ready_layers(rule, gradients, coming), damping)
        most_decrease = None
        if rule.bounds_decrease:
            bounded = stages.estimator.never_negative
            most_decrease = self.reviewer.most_decrease(coming.parameters, never_negative=bounded)
        updates = rule.updates(ready, damping, kl_clip, most_decrease)
        # Until they are written, .grad is still the gradient of the loss.
        self.reviewer.before_step(step, updates.quadratic, damping, coming)
        if self.inspect is not None:
            self.inspect(ready, updates.tensors)
        rule.write(ready, updates, coming.optimizer, coming.loss_scale, step, self.events)
        numbers = StepNumbers(step, damping, updates.clip, updates.quadratic / 2, kl_clip)
        self.last_step = numbers if self.reviewer.last is None else self.reviewer.last.added_to(numbers)

    def _step_over(self, optimizer: Optimizer | None) -> None:
        self._stages.steps.end()
        self.reviewer.stepped(self.layers.parameters(optimizer), optimizer)

    def skip(self, optimizer: Optimizer) -> None:
        """Count a step that an optimizer made without :meth:`precondition`; its layers' statistics are forgotten."""
        self.batches.skip(self.layers.stepped_by(optimizer))
        self._step_over(optimizer)

    def reopen_step(self) -> None:
        """Take the coming forward for one more of the step that was preconditioned last.

        An optimizer that calls its closure again (SAM) has made no step yet.
        """
        self._stages.steps.reopen()

    def review(self, *, optimizer: Optimizer | None = None) -> Verdict | None:
        """After the optimizer's step: see whether it did what was expected, and adjust the KL clip.

        It is what ``kl_clip="auto"`` adapts to (:mod:`lightning_kfc.trust_region.region`). Only a few steps are
        reviewed. There :meth:`capture` has recorded the forward as tensor operations, which are
        replayed with the new weights (:mod:`lightning_kfc.trust_region.tape`); none of the user's code runs again. A
        step that did much less than expected is shortened to the best point on its way, with the momentum that it
        leaves, or taken back where there is none.

        Args:
            optimizer: The optimizer that made the step; its momentum is shortened with the step.

        Returns:
            What followed, or None where there was nothing to review.
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
        """Everything that a resumed run needs, in plain tensors, numbers, strings, dicts and lists.

        Where layers are held by one rank each (``placement``), every rank must ask, and the first one has the state
        of all: it is the one to save. A run on any number of ranks can go on with it.

        Args:
            factors: Whether factors and inverses are in it. Without them a few numbers are left, and a resumed run
                estimates curvature anew.
        """
        return self._stages.state_dict(factors=factors)

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over a state; layers that do not fit start anew.

        Args:
            state: From :meth:`state_dict`, with tensors on any device.

        Returns:
            A sentence for each layer of the state or of the model that was not taken over.

        Raises:
            ValueError: If the state is of a version that this one does not read.
        """
        return self._stages.load_state_dict(state)
