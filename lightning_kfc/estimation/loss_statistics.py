"""The statistics of one loss: from its terms, from its rest, or from the gradient of the whole loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.estimation.back_propagation import added, back_propagate, numbers_of_examples, reaches
from lightning_kfc.estimation.example_gradients import ExampleGradients, StepExamples
from lightning_kfc.estimation.recording import Call
from lightning_kfc.estimation.rest import Rest
from lightning_kfc.estimation.seeds import (
    Seeds,
    WeightedTerm,
    all_zero,
    never_negative,
    seed_passes,
    seed_scale,
    signed_weights,
    unusable_seeds,
    weighted_terms,
)
from lightning_kfc.estimation.self_test_progress import SelfTestProgress
from lightning_kfc.estimation.sources import Sources
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.losses.likelihoods import Likelihood
from lightning_kfc.losses.recorder import LossRecorder
from lightning_kfc.losses.selection import THE_LOSS_ITSELF, LossNotRecognisedError, unrecognised, wanted_terms
from lightning_kfc.losses.terms import LossTerm
from lightning_kfc.losses.traits import LossTraits
from lightning_kfc.monitoring.events import Events


@dataclass(frozen=True)
class DueLoss:
    """A loss whose statistics are due.

    Attributes:
        loss: The scalar whose backward follows.
        step: The optimizer step.
        scale: The factor that a gradient scaler has multiplied ``loss`` by.
        fraction: The share of ``loss`` in the optimizer step, for terms without a known weight.
        losses: The loss functions that were called in the forward.
        calls: The calls of layers in the forward.
        examples: Collect the gradients of single examples, by layer.
        generator: The source of sampled targets, by device.
    """

    loss: Tensor
    step: int
    scale: float
    fraction: float
    losses: LossRecorder
    calls: Sequence[Call]
    examples: dict[str, ExampleGradients]
    generator: Callable[[torch.device], torch.Generator]


@dataclass
class Failures:
    """The errors that were raised while the statistics of layers were taken.

    Attributes:
        forgiving: Whether errors are noted and not raised, as from the first optimizer step on.
        by_layer: The first error of each layer.
    """

    forgiving: bool
    by_layer: dict[str, Exception] = field(default_factory=dict)

    def note(self, layer: str, error: Exception) -> None:
        """Note the error of a layer's statistics, or raise it before the first optimizer step."""
        if not self.forgiving:
            raise error
        self.by_layer.setdefault(layer, error)


@dataclass(frozen=True)
class StepStatistics:
    """The statistics of one loss.

    Attributes:
        by_layer: The statistics, by layer.
        unexplained: By layer, the reason why its rows do not rebuild its gradient; these layers are dropped.
        failed: The error that was raised while a layer's statistics were taken.
    """

    by_layer: Mapping[str, Statistics] = field(default_factory=dict)
    unexplained: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, Exception] = field(default_factory=dict)


class LossStatistics:
    """Chooses the terms of a loss that count, and back-propagates their seeds.

    Args:
        layers: The model's layers, which may change.
        examples: The gradients of single examples of this step.
        self_test: The test of every layer's rows.
        sources: Holds the sources of the statistics.
        events: Counts losses without usable statistics.
        fisher: The source of the targets: ``"mc"``, ``"exact"`` or ``"empirical"``.
        likelihood: The likelihood of the loss, or ``"auto"``.

    Attributes:
        traits: What holds for the losses of the last step with statistics.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        examples: StepExamples,
        self_test: SelfTestProgress,
        sources: Sources,
        events: Events,
        fisher: str,
        likelihood: str | Likelihood,
    ) -> None:
        self._layers = layers
        self._examples = examples
        self._self_test = self_test
        self._sources = sources
        self._events = events
        self._fisher = fisher
        self._likelihood = likelihood
        self.traits = LossTraits()

    def __call__(self, due: DueLoss, failures: Failures) -> dict[int, Statistics]:
        """The statistics of a loss, by the number of the call; removes the loss's terms from ``due.losses``.

        Args:
            due: The loss.
            failures: Takes the errors of layers.

        Raises:
            LossNotRecognisedError: If the loss holds no term of the given likelihood, before the first optimizer step.
        """
        calls, examples, fisher = due.calls, due.examples, self._fisher
        terms = list(due.losses.terms)
        kept = weighted_terms(
            due.loss, wanted_terms(terms, self._likelihood), loss_scale=due.scale, loss_fraction=due.fraction
        )
        test = self._self_test.running
        if test is not None:
            test.strict = not failures.forgiving
            test.recorded.difference_update(failures.by_layer)
        rest = Rest(due.loss, kept, calls, due.scale, differentiated=due.losses.differentiated)
        layers = [call for call in calls if call.adapter.has_rows] or calls
        apart = bool(kept) and self._likelihood == "auto" and rest.reaches(calls)
        mixed = apart and rest.reaches(layers)
        source = due.generator(kept[0].term.logits.device) if kept else None
        if source is not None and not all(w.is_finite() for w in kept):
            # All ranks need statistics of the same layers, so that all ranks drop the step together.
            seeds = unusable_seeds(kept, fisher, source)
            found = back_propagate(seeds, calls, 1.0, None, examples, on_failure=failures.note)
        elif all_zero(kept) and not apart:
            # A loss times 0 skips a batch, and must not change the curvature.
            self.report_no_gradient(due.step)
            found = {}
        elif source is not None and not all_zero(kept):
            scale = 1.0 if fisher == "empirical" else seed_scale(kept)
            saturates = not mixed and all(weighted.term.saturates for weighted in kept)
            traits = LossTraits(never_negative(due.loss, kept, due.scale), saturates, *signed_weights(kept))
            self.traits = self.traits.both(traits)
            passes = seed_passes(kept, fisher, source)
            found = back_propagate(passes, calls, scale, test, examples, on_failure=failures.note)
            functions = [weighted.term.function for weighted in kept]
            self._sources.note(functions, terms, rest if mixed else None, layers, due.step)
        else:
            self.traits, apart, mixed = LossTraits(), False, False
            found = self._of_whole_loss(due, rest, terms, failures)
        if apart:
            factor = _terms_per_example(kept, calls)
            found = added(found, self._empirical(due, rest.seeds(), failures, factor=factor, only_loose=not mixed))
        # A term outside this loss may belong to a later loss of the same training step.
        due.losses.terms[:] = [term for term in terms if all(term is not w.term for w in kept)]
        return found

    def _of_whole_loss(
        self, due: DueLoss, rest: Rest, terms: Sequence[LossTerm], failures: Failures
    ) -> dict[int, Statistics]:
        """The empirical Fisher of a loss without counting terms; nothing if a likelihood was given."""
        chosen = self._fisher == "empirical"
        if not chosen and self._likelihood != "auto":
            # A loss that trains no recorded layer need not be recognised.
            if reaches(due.loss, due.calls):
                message = unrecognised(terms, self._likelihood)
                if not failures.forgiving:
                    raise LossNotRecognisedError(message)
                self._events.report(
                    "unrecognised_losses", due.step, f"no statistics are taken of this loss: {message.rstrip('.')}"
                )
            return {}
        found = self._empirical(due, rest.seeds(), failures)
        if found and not any(bool(total.any()) for entry in found.values() for total in entry.sums.values()):
            self.report_no_gradient(due.step)
            for name in due.examples:
                if self._layers[name].pending is None:
                    self._examples.forget(name)
            return {}
        if found:
            self._sources.note([THE_LOSS_ITSELF], terms, None, due.calls, due.step)
        if found and not chosen:
            self._events.count("unrecognised_losses")
        return found

    def _empirical(
        self, due: DueLoss, seeds: Seeds, failures: Failures, *, factor: float = 0.5, only_loose: bool = False
    ) -> dict[int, Statistics]:
        r"""The empirical Fisher of a loss, or of its rest, as a mean over examples, in the unit of the loss.

        With :math:`h = \frac{f}{N}\sum_i h_i`, f the loss's fraction of the optimizer step, the rows of h itself are
        :math:`f/N` of those of the examples, so that :math:`G = (N/f)\sum_r g_r g_r^\top`, N the examples of each call.

        The unit of G is the loss's square, that of a curvature the loss. For the square of one number, half of G over
        the loss is the generalised Gauss-Newton matrix. For a sum of several squares it is too small by their number.

        Args:
            due: The loss.
            seeds: Those of the loss or of its rest.
            failures: Takes the errors of layers.
            factor: The factor on G over the loss: 1/2 for a whole loss. For a rest, which is taken as half of the
                loss, the number of recognised terms for each example.
            only_loose: Whether to end at parameters without rows, such as learnt weights of losses.
        """
        test = None if only_loose else self._self_test.running
        if test is not None and self._fisher != "empirical":
            # Parts of this gradient, such as a penalty on weights, have no rows.
            test.strict = False
        return back_propagate(
            iter([seeds]),
            due.calls,
            1.0,
            test,
            due.examples,
            mean_fractions=[unit * due.fraction / factor for unit in self._units(due)],
            on_failure=failures.note,
            only_loose=only_loose,
        )

    def _units(self, due: DueLoss) -> list[float]:
        """By call, the usual magnitude of the loss that trains its layer; that of this loss before there is one."""
        own = abs(float(due.loss.detach())) / due.scale / due.fraction
        usual = [self._layers[call.layer].loss.usual if call.layer in self._layers else math.nan for call in due.calls]
        # A loss of 0 has no gradient.
        return [unit if math.isfinite(unit) else own or 1.0 for unit in usual]

    def report_no_gradient(self, step: int) -> None:
        """Report a loss without a gradient, or with a zero one."""
        what = "no statistics are taken of this loss: its gradient is zero, or it has none"
        self._events.report("losses_without_gradient", step, what)


def _terms_per_example(terms: Sequence[WeightedTerm], calls: Sequence[Call]) -> float:
    """The number of terms with a weight for each example of the calls, at least 1."""
    number = sum(int((own.weights > 0).sum()) for own in terms)
    return max(1.0, number / max(numbers_of_examples(calls), default=1))
