"""The preconditioner: one training step, and the only place where its stages meet. It knows no Lightning."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_kfc.curvature.checkpoint import STATE_VERSION, check_version, layers_state, load_layers
from lightning_kfc.curvature.coverage import Coverage, coverage_of, without_curvature
from lightning_kfc.curvature.find_layers import LayerOptions
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.model_layers import ModelLayers
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.distributed.agreement import check_agreement, facts_of
from lightning_kfc.estimation.estimator import Estimator
from lightning_kfc.estimation.loss_statistics import StepStatistics
from lightning_kfc.estimation.pending import PendingStatistics
from lightning_kfc.factors.inverses import INVERSES
from lightning_kfc.monitoring.events import Events, StepNumbers
from lightning_kfc.monitoring.messages import inform
from lightning_kfc.monitoring.timing import StepTimes
from lightning_kfc.refresh.factors import FactorRefresh
from lightning_kfc.refresh.inverses import InverseRefresh
from lightning_kfc.rules.base import Inspection, ReadyLayer, Rule
from lightning_kfc.rules.choice import RULE_TYPES, choose_rule, with_rule
from lightning_kfc.rules.ready import ready_layers
from lightning_kfc.rules.update_exchange import received_updates
from lightning_kfc.scheduling.automatic_periods import PeriodChoice
from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.scheduling.staggering import StaggeredDates
from lightning_kfc.scheduling.tracker import RefreshTracker
from lightning_kfc.settings import Options, Settings, settings_of
from lightning_kfc.trust_region.region import TrustRegion, Verdict
from lightning_kfc.trust_region.review import StepReviewer
from lightning_kfc.utilities.isolation import eager_compiled_code, full_precision


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
        self._start(model, settings_of("KFC", settings, options), process_group)

    def _start(self, model: nn.Module, settings: Settings, process_group: Any) -> None:
        self._group = distributed.ProcessGroup(process_group)
        self._model = model
        self._layers = ModelLayers(model, LayerOptions.of(settings))
        #: The rule, and why it was chosen, where it is ``"auto"``.
        self.rule_choice = choose_rule(model, self._layers, settings)
        #: As they were given; :attr:`settings` are those in force, with the rule that was chosen.
        self.given_settings = settings
        self.settings = settings = with_rule(settings, self.rule_choice)
        self._rule: Rule[Any] = RULE_TYPES[settings.rule]()
        kind = INVERSES[settings.inverse]
        #: Where the time of a step goes; runs only between its own begin_step() and end_step().
        self.times = StepTimes()
        factors, inverses = (
            None if period == "auto" else period
            for period in (settings.factor_every_n_steps, settings.inverse_every_n_steps)
        )
        self._periods = PeriodChoice(settings.schedule, factors, inverses, settings.timing.max_overhead, self.times)
        self._tracker = RefreshTracker(
            settings.schedule,
            StaggeredDates(
                settings.schedule,
                self._layers.costs,
                staggered=settings.timing.stagger_inverses,
                # EKFAC's eigenvalues, carried over into a new basis, are best corrected by statistics of the same step.
                with_statistics=kind.wants_examples,
            ),
        )
        self._stepped = False
        # Whether an optimizer evaluates its closure once more in the same step.
        self._again = False
        self._backward = contextlib.ExitStack()
        self._ranks_agree = False
        self._micro_batch = 0
        self.step = 0
        self.events = Events()
        self.last_step: StepNumbers | None = None
        #: Where set, called at each step with the layers, their gradients and their updates; both may be views.
        self.inspect: Inspection | None = None
        self.communication = distributed.Communication()
        self._ownership = LayerOwnership(self._group, settings.placement, kind, self._layers, self.communication)
        self._estimator = Estimator(
            model,
            self._layers,
            self._tracker,
            self._group,
            self.times,
            self.events,
            fisher=settings.fisher,
            likelihood=settings.likelihood,
            kind=kind,
            seed=settings.seed,
        )
        self._pending = PendingStatistics(self._layers, self._estimator, self._tracker, self._group, self.events)
        self._refresh_factors = FactorRefresh(
            settings.ema_decay, settings.precision.reduction, self._tracker, self.events, self._ownership
        )
        self._refresh_inverses = InverseRefresh(kind, self._tracker, self.events, self._ownership)
        #: Holds damping and bound in force, and reviews steps.
        self.reviewer = StepReviewer(
            model, TrustRegion.of(settings), settings.damping, settings.kl_clip, self.events, self._ownership
        )

    def restart(self) -> None:
        """Forget everything that was estimated, counted and set since, as if newly made of the same settings.

        The layers are found anew. :attr:`inspect` stays, since it belongs to whoever has set it.
        """
        self.resume()
        inspect = self.inspect
        self._start(self._model, self.given_settings, self._group.group)
        self.inspect = inspect

    # What is covered.

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The preconditioned layers by module name."""
        return self._layers

    @property
    def recorded(self) -> tuple[str, ...]:
        """The layers whose statistics are taken at this step."""
        return tuple(self._estimator.recorded)

    @property
    def schedule(self) -> RefreshSchedule:
        """When statistics and inverses are due; where a period is ``"auto"``, the default's until it is chosen."""
        return self._periods.schedule

    @property
    def statistics_source(self) -> str:
        """What the last statistics came from: the loss functions, or the gradient of the loss itself."""
        return ", ".join(self._estimator.sources) or "nothing so far"

    def coverage(self) -> Coverage:
        """Every parameter with how it is treated now, and why; before the first step, how it will be."""
        inverse, moments = INVERSES[self.settings.inverse], self._rule.moments_per_parameter
        idle = without_curvature(self._layers.values()) if self._has_stepped else {}
        return coverage_of(self._model, self._layers, inverse, moments, idle)

    def follow_structure(self) -> str | None:
        """Look for what was added to the model, replaced or taken away since; what is known of other layers stays.

        :meth:`capture` does so at each step that takes statistics. All ranks must do so at the same step.

        Returns:
            What has changed, in words; None where nothing has.
        """
        if not self._layers.changed():
            return None
        change = self._layers.follow()
        new = [layer.name for layer in change.new]
        self._refresh_factors.follow(change.kept)
        self._pending.follow_layers(change.kept)
        self._tracker.follow(change.kept, new, self.step)
        self._ownership.follow(change.kept)
        self._estimator.follow(change.kept, new, self.step)
        self._ranks_agree = False
        said = str(change)
        return f"KFC at step {self.step}: the layers of the model have changed; {said}." if said else None

    # A step, in the order of its parts.

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record what the forward and the loss of this (micro-)batch show, if this step is due; else do nothing.

        Compute the loss inside. Compiled code runs eagerly there, and only there.
        """
        self._begin_step_if_over()
        self._estimator.forgiving = self._has_stepped
        recorded = self._tracker.statistics_due(self.step) or self._tracker.recorded_at(self.step, self._layers)
        if recorded and self._micro_batch == 0 and (changed := self.follow_structure()):
            inform(changed)
        if not self._ranks_agree:
            check_agreement(
                facts_of(self.settings) | {"layers": str(self._layers)}, next(self._model.parameters()).device
            )
            self._ranks_agree = True
        if self._again:
            self._estimator.record_nothing()
            self.reviewer.release()
            yield
            return
        with self.reviewer.record(self.step), self._estimator.capture(self.step):
            try:
                yield
            finally:
                self.resume()

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
        recorded = self._estimator.active or not self._layers
        if not recorded and self._tracker.statistics_due(self.step):
            raise RuntimeError(
                f"KFC has recorded nothing at step {self.step}: compute the loss inside `with kfc.capture():`."
            )
        self.back_propagate(loss, loss_scale=loss_scale, loss_fraction=loss_fraction)
        if not accumulate:
            self.refresh()

    def back_propagate(self, loss: Tensor, *, loss_scale: float = 1.0, loss_fraction: float = 1.0) -> None:
        """The first half of :meth:`update`: send the seeds to the layers while the loss's graph lives."""
        self.reviewer.note_loss(loss, loss_scale)
        if not self._estimator.active:
            return
        # In manual optimization the forward is still being recorded.
        self.pause()
        expected = set(self.recorded)
        self._estimator.forgiving = self._has_stepped
        try:
            before = set(self._layers)
            self._give_up(self._estimator.differentiated(loss))
            self._estimator.record_replacements(before)
            # A layer that was given up has others in its place.
            expected.update(self.recorded)
            found = self._estimator.statistics(
                loss,
                self.step,
                self._micro_batch,
                loss_scale=loss_scale,
                loss_fraction=loss_fraction,
                unseen=self._pending.unseen,
            )
        except Exception as error:
            if not self._has_stepped:
                raise
            found = StepStatistics(failed=dict.fromkeys(expected, error))
        finally:
            self.resume()
        self._give_up(found.unexplained)
        self._pending.leave_out(found.failed, self.step)
        self._refresh_factors.expect(expected)
        # Finite or not is for all ranks to decide together: refresh() checks the sum over ranks.
        self._pending.add(found.by_layer)
        self._micro_batch += 1

    def _give_up(self, reasons: Mapping[str, str]) -> None:
        if self._group.size == 1:
            self._layers.drop_all(reasons)
        else:
            # The next refresh of factors returns them, when all ranks know.
            self._refresh_factors.give_up_together(reasons)

    @property
    def _has_stepped(self) -> bool:
        """Whether an optimizer step has been made: from then on, training goes on whatever happens here."""
        return self._stepped or self.step > 0

    def forget(self, layers: Iterable[str]) -> None:
        """Take no statistics of layers until their next step: their gradient gets a part that was not seen here."""
        self._pending.forget(layers)

    def skip(self, optimizer: Optimizer) -> None:
        """Count a step that an optimizer made without :meth:`precondition`; its layers' statistics are forgotten."""
        names = self.learning_rates(optimizer)
        self._pending.skip(names)
        self._refresh_factors.discard(names)
        self.reviewer.cancel()
        self._step_over(optimizer)

    def ages(self, layer: str) -> tuple[int | None, int | None]:
        """Steps since a layer's statistics, and its inverse, were last refreshed; None where they never were."""
        return self._tracker.ages(layer, self.step)

    def release(self) -> None:
        """Let go of what was recorded of the last forward and its graph."""
        self._estimator.release()
        self.reviewer.release()
        self._refresh_factors.abandon()

    def follow_gradients(self) -> None:
        """Let statistics live and die with the gradient they belong to; call it just before each backward.

        Where a loss passes through a network that another optimizer trains (a generator's loss through the
        discriminator), that gradient is zeroed before it is ever used, and its statistics must not stay either.
        """
        self._pending.follow_gradients()

    def learning_rates(self, optimizer: Optimizer) -> dict[str, float]:
        """The learning rate of each layer all of whose trainable parameters belong to an optimizer.

        Where they are spread over its groups, that of the weight's group.
        """
        return self._layers.learning_rates(optimizer)

    def refresh(self, optimizer: Optimizer | None = None) -> None:
        """The second half of :meth:`update`: fold statistics into the factors, and refresh the inverses, where due.

        Args:
            optimizer: Only for the layers whose parameters this optimizer steps; None for all.
        """
        self._refresh(self._layers.present() if optimizer is None else self.learning_rates(optimizer))

    def begin_refresh(self, optimizer: Optimizer) -> None:
        """Begin to add up over ranks what a step's losses have brought; the backward goes on meanwhile."""
        if self._refresh_factors.expects(self.layers):
            with full_precision(self._model):
                self._refresh_factors.begin([self._layers[name] for name in self.learning_rates(optimizer)])

    def refresh_if_finite(self, optimizer: Optimizer) -> None:
        """:meth:`refresh` after a step's last backward, unless a gradient says that the step will be skipped.

        What is left then is dropped by :meth:`precondition`. Scaled gradients tell as well as unscaled ones.
        """
        # Asked first: this comes after every backward, and between due steps nothing waits.
        if not self._refresh_factors.expects(self.layers):
            return
        names = self.learning_rates(optimizer)
        if self._refresh_factors.expects(names) and self._all_finite(optimizer, names):
            self._refresh(names)

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
        if (lr is None) == (optimizer is None):
            raise ValueError(
                "precondition() takes either lr=... or optimizer=..., to know the step that the KL clip bounds."
            )
        # Until the step is made: it is no part of a loss.
        self.reviewer.pause()
        rates = dict.fromkeys(self._layers.present(), float(lr)) if lr is not None else {}
        if optimizer is not None:
            rates = self.learning_rates(optimizer)
        with self.times.part("preconditioning"):
            if not self._all_finite(optimizer, rates):
                self._abandon_step(rates)
                return False
            self._refresh(rates)
            with torch.no_grad(), full_precision(self._model):
                self._replace_gradients(rates, optimizer, loss_scale, loss_gradients or {})
        self._step_over(optimizer)
        return True

    def _abandon_step(self, names: Iterable[str]) -> None:
        """Forget the statistics and the losses of a step whose gradients are not finite: it is made anew, of others."""
        self._pending.drop(names)
        self._refresh_factors.discard(names)
        self.reviewer.forget_losses()
        self.reviewer.resume()
        self.events.count("nonfinite_gradients")

    def _replace_gradients(
        self,
        rates: Mapping[str, float],
        optimizer: Optimizer | None,
        loss_scale: float,
        loss_gradients: Mapping[int, Tensor],
    ) -> None:
        damping, kl_clip, parameters = self.damping, self.kl_clip, self._layers.parameters(optimizer)
        ready = received_updates(self._ownership, self._ready(rates, optimizer, loss_scale), damping)
        most_decrease = None
        if self._rule.bounds_decrease:
            never_negative = self._estimator.never_negative
            most_decrease = self.reviewer.most_decrease(parameters, never_negative=never_negative)
        updates = self._rule.updates(ready, damping, kl_clip, most_decrease)
        # Until they are written, .grad is still the gradient of the loss.
        self.reviewer.before_step(
            self.step, updates.quadratic, damping, optimizer, parameters, loss_scale, loss_gradients
        )
        if self.inspect is not None:
            self.inspect(ready, updates.tensors)
        self._rule.write(ready, updates, optimizer, loss_scale, self.step, self.events)
        numbers = StepNumbers(self.step, damping, updates.clip, updates.quadratic / 2, kl_clip)
        self.last_step = numbers if self.reviewer.last is None else self.reviewer.last.added_to(numbers)

    def _ready(self, rates: Mapping[str, float], optimizer: Optimizer | None, loss_scale: float) -> list[ReadyLayer]:
        """The layers that have an inverse and a gradient, with the gradient as a matrix."""
        layers = [self._layers[name] for name in rates]
        gradients = {layer: own for layer in layers if (own := layer.gradients()) is not None}
        self._pending.warn([layer.name for layer in gradients if self._pending.without_curvature(layer, self.step)])
        return ready_layers(self._rule, gradients, rates, optimizer, loss_scale)

    def _step_over(self, optimizer: Optimizer | None) -> None:
        self._stepped = True
        self.reviewer.stepped(self._layers.parameters(optimizer), optimizer)

    @property
    def damping(self) -> float:
        """The damping in force at this step."""
        return self.reviewer.damping_at(self.step)

    @property
    def kl_clip(self) -> float | None:
        """The bound on the squared norm of a step in force at this step; None for none."""
        return self.reviewer.kl_clip

    def reopen_step(self) -> None:
        """Take the coming forward for one more of the step that was preconditioned last.

        An optimizer that calls its closure again (SAM) has made no step yet.
        """
        self._stepped, self._again = False, True

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
        with self.times.part("reviews"):
            verdict = self.reviewer.review(self.layers.values(), optimizer)
        self.reviewer.resume()
        self._again = False
        if verdict is not None and verdict.undo:
            names = self.layers if optimizer is None else self.learning_rates(optimizer)
            self._rule.forget_momentum([self.layers[name] for name in names])
        if verdict is not None and verdict.refresh:
            self._tracker.refresh_soon(self.layers, self.step + 1)
        return verdict

    def _refresh(self, names: Iterable[str]) -> None:
        layers = [self._layers[name] for name in names]
        self._estimator.recount({layer.name for layer in layers if layer.pending is not None})
        self._measure_units(layers)
        damping = self.damping
        try:
            with full_precision(self._model):
                with self.times.part("statistics"):
                    folded = self._refresh_factors(layers, self.step)
                self._layers.drop_all(folded.given_up)
                self._pending.unseen.update(folded.unusable)
                with self.times.part("inverses"):
                    self._refresh_inverses(layers, self.step, damping)
                with self.times.part("statistics"):
                    # In the basis that the refresh has left.
                    moments = self._estimator.examples.second_moments(layers)
                    self._refresh_factors.fold_second_moments(layers, self.step, moments)
        except Exception as error:
            # With several ranks the others wait for what this one has not sent, so that it cannot go on alone.
            if not self._has_stepped or self._group.size > 1:
                raise
            self._pending.leave_out({layer.name: error for layer in layers}, self.step)

    def _measure_units(self, layers: Sequence[Layer]) -> None:
        """Measure the units of automatic settings, where a refresh follows. Collective."""
        if not self._refreshes([layer.name for layer in layers]):
            return
        parameters = [parameter for layer in layers for parameter in layer.trained_parameters().values()]
        self.reviewer.measure_loss(parameters, never_negative=self._estimator.never_negative)
        if self.reviewer.damping_is_automatic:
            for layer in layers:
                layer.measure_weights()

    def pause(self) -> None:
        """Record nothing until :meth:`resume`: a backward re-runs checkpointed forwards, which belong to no loss."""
        if self._estimator.active or self.reviewer.recording:
            # What ran eagerly in the forward, a checkpoint must run eagerly again in the backward.
            self._backward.enter_context(eager_compiled_code())
        self._estimator.pause()
        self.reviewer.pause()

    def resume(self) -> None:
        """Record again, if the capture is still open; also to be called where a backward has raised."""
        self._estimator.resume()
        self._backward.close()
        self.reviewer.resume()

    # The parts of a step.

    def _all_finite(self, optimizer: Optimizer | None, layers: Collection[str]) -> bool:
        # Also those of parameters that are not preconditioned.
        finite = distributed.all_finite([p.grad for p in self._layers.parameters(optimizer) if p.grad is not None])
        # Where messages follow, no rank may be the only one to wait for them, whatever its own gradients are.
        if self._group.size > 1 and (self.reviewer.active or self._refreshes(layers)):
            return self._group.all_agree(finite, next(self._model.parameters()).device)
        return finite

    def _refreshes(self, layers: Collection[str]) -> bool:
        """Whether a refresh of these layers at this step takes statistics or makes inverses, on any rank."""
        expected = self._refresh_factors.expects(layers)
        return expected or self._refresh_inverses.any_due(layers, self.step, self.damping)

    def _begin_step_if_over(self) -> None:
        if self._stepped:
            self.step += 1
            self._stepped = False
            self._micro_batch = 0
            self.reviewer.step_begins()
            taken, device = bool(self._estimator.recorded), next(self._model.parameters()).device
            chosen = self._periods.step_begins(self.step - self._tracker.started_at, statistics=taken, device=device)
            if chosen is not None:
                self._tracker.reschedule(self.schedule)
                inform(chosen)

    # State.

    def state_dict(self, *, factors: bool = True) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain tensors, numbers, strings, dicts and lists.

        Where layers are held by one rank each (``placement``), every rank must ask, and the first one has the state
        of all: it is the one to save. A run on any number of ranks can go on with it.

        Args:
            factors: Whether factors and inverses are in it. Without them a few numbers are left, and a resumed run
                estimates curvature anew.
        """
        return {
            "version": STATE_VERSION,
            "step": self.step + int(self._stepped),
            "layers": layers_state(self._layers, self._ownership) if factors else None,
            "periods": self._periods.state_dict(),
            "dropped": dict(self._layers.dropped),
            "self_test_done": self._estimator.self_test.done,
            "never_negative": self._estimator.never_negative,
        } | {name: part.state_dict() for name, part in self._parts_with_state.items()}

    @property
    def _parts_with_state(self) -> dict[str, Any]:
        """The parts whose state is loaded once the periods are known, by their name in a state."""
        return {
            "due": self._tracker,
            "events": self.events,
            "trust_region": self.reviewer.region,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over a state; layers that do not fit start anew.

        Args:
            state: From :meth:`state_dict`, with tensors on any device.

        Returns:
            A sentence for each layer of the state or of the model that was not taken over.

        Raises:
            ValueError: If the state is of a version that this one does not read.
        """
        check_version(state)
        self.step = int(state["step"])
        self._stepped = False
        for name, reason in state["dropped"].items():
            if name in self._layers:
                self._layers.drop(name, reason)
        self._estimator.restore(
            self_test_done=bool(state["self_test_done"]), never_negative=bool(state.get("never_negative", False))
        )
        self._periods.load_state_dict(state.get("periods", {}))
        self._tracker.reschedule(self.schedule)
        for name, part in self._parts_with_state.items():
            part.load_state_dict(state.get(name, {}))
        if state["layers"] is None:
            self._tracker.restart(self.step)
            return ["the state holds no factors: curvature is estimated anew, beginning with a warm-up"]
        loaded = load_layers(
            self._layers,
            state["layers"],
            INVERSES[self.settings.inverse],
            self._ownership,
            with_moments=self.settings.rule == "adam",
        )
        for name in loaded.anew:
            self._tracker.forget(name)
        if not any(self._tracker.has_statistics(name) for name in self._layers):
            self._tracker.restart(self.step)
        return list(loaded.problems)
