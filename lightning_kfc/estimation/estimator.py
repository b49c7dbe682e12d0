"""Record forward and loss where statistics are due, and compute each layer's statistics."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from torch import Tensor, nn

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed.process_group import ProcessGroup
from lightning_kfc.estimation.custom_functions import CustomFunctions
from lightning_kfc.estimation.example_gradients import StepExamples
from lightning_kfc.estimation.graph import refuse_reentrant_checkpointing
from lightning_kfc.estimation.loss_statistics import DueLoss, Failures, LossStatistics, StepStatistics
from lightning_kfc.estimation.random_streams import RandomStreams
from lightning_kfc.estimation.recording import Call, ForwardRecorder, parameter_call
from lightning_kfc.estimation.rest import Rest
from lightning_kfc.estimation.self_test_progress import SelfTestProgress, layers_with_rows
from lightning_kfc.estimation.sources import Sources
from lightning_kfc.factors.inverses import Inverse
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.losses.likelihoods import Likelihood
from lightning_kfc.losses.recorder import LossRecorder
from lightning_kfc.losses.selection import attach_named_output
from lightning_kfc.losses.traits import LossTraits
from lightning_kfc.monitoring.events import Events
from lightning_kfc.monitoring.timing import StepTimes
from lightning_kfc.scheduling.step_counter import StepCounter
from lightning_kfc.scheduling.tracker import RefreshTracker
from lightning_kfc.utilities.isolation import eager_compiled_code, full_precision, leaving_no_trace, sinks_at_rest

#: The reason for no Kronecker factors of layers whose weights are used in derivatives of the network.
DIFFERENTIATED = "the loss holds derivatives of the network, in which weights are used outside their layers"


class Estimator:
    """Records forward and loss of each due step, and computes the statistics.

    Args:
        model: The model.
        layers: The model's layers, which may change.
        tracker: The dates of each layer.
        group: The ranks between which the batch is split; each rank samples its own targets.
        steps: The number of the step. Before the first optimizer step, errors are raised.
        times: Adds up the time of the estimation.
        events: Counts losses without usable statistics.
        fisher: The source of the targets: ``"mc"``, ``"exact"`` or ``"empirical"``.
        likelihood: The likelihood of the loss, or ``"auto"``.
        kind: The user's kind of inverse; some need the gradients of single examples.
        seed: Seed of the sampling of targets.

    Attributes:
        recorded: The layers whose statistics are taken at this step.
        examples: The gradients of single examples of this step.
        self_test: The test of every layer's rows.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        tracker: RefreshTracker,
        group: ProcessGroup,
        steps: StepCounter,
        times: StepTimes,
        events: Events,
        *,
        fisher: str,
        likelihood: str | Likelihood,
        kind: type[Inverse],
        seed: int,
    ) -> None:
        self._model, self._layers, self._tracker, self._steps = model, layers, tracker, steps
        self._times = times
        self._events = events
        self._likelihood = likelihood
        self._kind = kind
        self._streams = RandomStreams(seed, group.rank)
        self._recorder: ForwardRecorder | None = None
        self._losses: LossRecorder | None = None
        self.examples = StepExamples(layers, tracker)
        self.self_test = SelfTestProgress(layers, self._streams)
        self._graph_checked = False
        self._sources = Sources()
        self._of_losses = LossStatistics(
            layers, self.examples, self.self_test, self._sources, events, fisher, likelihood
        )
        self.recorded: list[str] = []

    @property
    def sources(self) -> Sequence[str]:
        """The source of the last statistics, such as loss functions, or the gradient of the whole loss."""
        return self._sources.last

    @property
    def traits(self) -> LossTraits:
        """What holds for the losses of the last step with statistics."""
        return self._of_losses.traits

    def restore(self, traits: LossTraits, *, self_test_done: bool) -> None:
        """Restore the state of the estimation."""
        self.self_test.restart(done=self_test_done)
        self._of_losses.traits = traits

    @property
    def active(self) -> bool:
        """Whether a recorded forward is held."""
        return self._recorder is not None

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record the forward and the loss of this (micro-)batch if the step is due; else do nothing."""
        step = self._steps.number
        self.recorded = self._tracker.recorded_at(step, self._layers)
        if not self.recorded:
            self.release()
            yield
            return
        self._recorder, self._losses = ForwardRecorder(times=self._times), LossRecorder()
        test = self.self_test.prepare(step, self.recorded)
        waiting = set(test.waiting) if test is not None else set()
        handles = []
        try:
            for name, layer in layers_with_rows(self._layers, self.recorded).items():
                wanted = functools.partial(test.direction, name) if test is not None and name in waiting else None
                keep_inputs = layer.inverse_type(self._kind).wants_examples
                self._recorder.attach(name, layer.adapters, wanted, keep_inputs=keep_inputs)
            try:
                handles += attach_named_output(self._model, self._likelihood, self._losses)
            except ValueError:
                # From the second step on, the loss is reported as one without a term of the likelihood.
                if not self._steps.any_made:
                    raise
            with eager_compiled_code(), self._losses:
                yield
        finally:
            self._recorder.detach()
            for handle in handles:
                handle.remove()

    def record_nothing(self) -> None:
        """Record nothing of the coming forward."""
        self.recorded = []
        self.release()

    def release(self) -> None:
        """Release the last recorded forward and its graph."""
        self._recorder = self._losses = None

    def pause(self) -> None:
        """Record nothing until :meth:`resume`; until then, compiled code must run eagerly."""
        if self._recorder is not None and self._losses is not None:
            self._recorder.paused = self._losses.paused = True

    def resume(self) -> None:
        """Record again, if the capture is still open."""
        if self._recorder is not None and self._losses is not None:
            self._recorder.paused = self._losses.paused = False

    def recount(self, layers: Set[str]) -> None:
        """Count the calls' input rows again with the next loss, since their statistics were dropped."""
        if self._recorder is not None:
            calls, counted = self._recorder.calls, self._recorder.counted
            counted.difference_update([i for i in counted if calls[i].layer in layers])

    def follow(self, kept: Mapping[str, str], new: Iterable[str], step: int) -> None:
        """Follow a model whose layers have changed, and test the new ones.

        Args:
            kept: The present name of each remaining layer, by its former name.
            new: The names of the new layers.
            step: The optimizer step.
        """
        self.examples.follow(kept)
        self.self_test.follow(kept, new, step)

    def differentiated(self, loss: Tensor) -> dict[str, str]:
        """The layers whose weights are used in derivatives of the network, with the reason to drop them.

        Args:
            loss: The scalar whose backward follows.
        """
        if self._recorder is None or self._losses is None or not (self._losses.differentiated and loss.requires_grad):
            return {}
        names = Rest(loss, [], self._recorder.calls, 1.0, differentiated=True).uses_weights_of()
        reasons = {name: DIFFERENTIATED for name in self._layers if name in names}
        self.self_test.give_up(reasons)
        return reasons

    def record_replacements(self, before: Set[str]) -> None:
        """Record the layers that have replaced dropped ones; ``before`` has the names before the replacement."""
        self.recorded = [name for name in self._layers if name in self.recorded or name not in before]

    def statistics(
        self,
        loss: Tensor,
        micro_batch: int,
        *,
        loss_scale: float,
        loss_fraction: float,
        unseen: Set[str],
    ) -> StepStatistics:
        """Back-propagate the seeds of a loss, while its graph lives. Call between :meth:`pause` and :meth:`resume`.

        Args:
            loss: The scalar whose backward follows.
            micro_batch: The number of earlier losses of this step.
            loss_scale: The factor that a gradient scaler has multiplied ``loss`` by.
            loss_fraction: The share of ``loss`` in the optimizer step, for terms without a known weight.
            unseen: Layers whose examples are not collected.

        Raises:
            LossNotRecognisedError: If the loss holds no term of the given likelihood, before the first optimizer step.
            SelfTestError: If the rows of a layer do not explain its gradient, before the first optimizer step.
        """
        if self._recorder is None or self._losses is None:
            return StepStatistics()
        if self._steps.any_made and not loss.requires_grad:
            self._of_losses.report_no_gradient(self._steps.number)
            return StepStatistics()
        failures = Failures(forgiving=self._steps.any_made)
        for name, error in self._recorder.failures.items():
            failures.note(name, error)
        if (failure := self._losses.failure) is not None:
            what = f"a loss function could not be read and is not recognised: {type(failure).__name__}: {failure}"
            self._events.report("failed_statistics", self._steps.number, what)
        if micro_batch == 0:
            self._of_losses.traits = LossTraits(never_negative=True, saturates=True)
        custom = CustomFunctions()
        try:
            with (
                self._times.phase("statistics"),
                full_precision(self._model),
                leaving_no_trace(self._model),
                sinks_at_rest(loss),
                custom.kept(loss) if loss.requires_grad else contextlib.nullcontext(),
            ):
                return self._statistics(loss, micro_batch, loss_scale, loss_fraction, unseen, failures)
        except Exception as error:
            if custom.failed is None:
                raise
            what = f"the backward of {custom.failed!r}, a custom autograd function, failed"
            failure = RuntimeError(f"{what}: {type(error).__name__}: {error}")
            return StepStatistics(failed=dict.fromkeys(self.recorded, failure))
        finally:
            self._sources.report_used_up(custom.used_up, self._steps.number)

    # Parts of a due step.

    def _statistics(
        self,
        loss: Tensor,
        micro_batch: int,
        loss_scale: float,
        loss_fraction: float,
        unseen: Set[str],
        failures: Failures,
    ) -> StepStatistics:
        assert self._recorder is not None
        assert self._losses is not None
        step, recorded = self._steps.number, list(self._recorder.calls)
        calls = recorded + self._parameter_calls()
        names = {call.layer for call in recorded if call.inputs is not None}
        examples = self.examples.of(names - unseen, step)
        if not self._graph_checked:
            refuse_reentrant_checkpointing(loss)
            self._graph_checked = True
        generator = self._streams.generator(step, micro_batch)
        due = DueLoss(loss, step, loss_scale, loss_fraction, self._losses, calls, examples, generator)
        test = self.self_test.running
        found = self._of_losses(due, failures)
        unexplained = {} if test is None else self.self_test.concluded(test, self._recorder.transformed)
        if loss.requires_grad:
            self.self_test.follow_uses(loss, recorded, step)
        statistics = self._by_layer(found, calls, len(recorded))
        kept = {n: own for n, own in statistics.items() if n in self._layers and n not in failures.by_layer}
        return StepStatistics(kept, unexplained, failures.by_layer)

    def _parameter_calls(self) -> list[Call]:
        return [
            parameter_call(name, layer.adapter)
            for name, layer in self._layers.items()
            if name in self.recorded and not layer.adapter.has_rows and layer.adapter.own_parameters()
        ]

    def _by_layer(self, found: dict[int, Statistics], calls: Sequence[Call], recorded: int) -> dict[str, Statistics]:
        """The statistics of every layer, from those of its calls."""
        assert self._recorder is not None
        counted = self._recorder.counted
        statistics: dict[str, Statistics] = {}
        for index, entry in found.items():
            name = calls[index].layer
            if index < recorded:
                # A later loss through the same call adds to G alone: A already holds the call's input rows.
                entry = entry.without_means() if index in counted else entry
                counted.add(index)
            statistics[name] = statistics[name] + entry if name in statistics else entry
        return statistics
