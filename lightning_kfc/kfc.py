"""The preconditioner: the one owner of mutable state; it knows no Lightning."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc import distributed
from lightning_kfc.capture import Recorder, parameter_call
from lightning_kfc.coverage import Coverage, coverage_of
from lightning_kfc.discovery import LossRecorder, LossTerm, named_output_hook
from lightning_kfc.factors.inverse import INVERSES, FactorisationError
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.find_layers import find_layers
from lightning_kfc.fisher import (
    back_propagate,
    empirical_statistics_of_loss,
    seed_passes,
    seed_scale,
    weighted_terms,
)
from lightning_kfc.layer import Layer
from lightning_kfc.likelihood import Likelihood
from lightning_kfc.monitor import Events, StepNumbers
from lightning_kfc.per_example import ExampleGradients
from lightning_kfc.rules.natural import natural_step
from lightning_kfc.schedule import value_at
from lightning_kfc.selftest import SelfTest
from lightning_kfc.settings import Settings

STATE_VERSION = 1


class LossNotRecognisedError(RuntimeError):
    """No loss term was recognised in the loss, so that the Fisher matrix is not known."""


class KFC:
    r"""Kronecker-factored preconditioning of a model's gradients (Grosse & Martens 2016, arXiv:1602.01407).

    In a plain loop::

        kfc = KFC(model)
        with kfc.capture():
            loss = loss_fn(model(x), y)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()

    Args:
        model: The model. Modules that exist now are covered, those added later are not.
        damping: :math:`\lambda` of E4, in the units of the Fisher matrix of the loss; a number, or a function of
            the step such as :class:`~lightning_kfc.ExponentialSchedule`.
        fisher: Whose targets the curvature is taken with: ``"mc"``: one sample a term from the model's own
            distribution; ``"exact"``: all its outcomes, one back-propagation each; ``"empirical"``: the data's.
        likelihood: What the loss is the negative logarithm of. ``"auto"`` recognises it from the loss
            functions that are called; ``"categorical"``, ``"bernoulli"`` and ``"gaussian"`` keep only terms of that
            kind; a :class:`~lightning_kfc.likelihood.Likelihood` with ``output_of`` names the module whose output is
            the logits, for losses computed otherwise.
        factor_every_n_steps: Statistics are taken every so many optimizer steps (the paper's T_cov).
        inverse_every_n_steps: Inverses are refreshed every so many optimizer steps (the paper's T_inv).
        warmup_steps: During the first so many optimizer steps statistics are taken at every step.
        ema_decay: :math:`\rho`, the decay of the factors' zero-debiased running averages, at least 0, below 1.
        kl_clip: :math:`\kappa` of E7, the bound on the squared norm of a step in the Fisher metric; None for none.
        inverse: How damped factors are inverted: ``"cholesky"`` (E4, E5: damping split over both factors);
            ``"eigh"`` (E6: exact damping, that of the present step); ``"ekfac"``: E6 with the running second moments of
            the examples' gradients as eigenvalues (George et al. 2018). That one keeps what the layers read, and the
            derivatives at their outputs, through the backward of the steps that refresh inverses.
        rule: How gradients and inverses make an update: ``"natural"``, the paper's KFC-pre.
        weight_sharing: ``"expand"``: each use of a weight is a row; ``"reduce"``: each example is one.
        max_factor_dim: A factor of more dimensions is held as its diagonal, which :meth:`coverage` shows; None for no
            bound. The default admits every layer of the usual convolutional nets and transformers (d_in 4,609 in a
            ResNet-50, 9,217 in the widest ResNets), and no vocabulary; a factor with its inverse takes 0.8 GB there.
        include: Glob patterns over module names; only these are preconditioned. None for all.
        exclude: Glob patterns over module names that are not preconditioned.
        seed: Seed of the sampling of targets; the global random stream is never touched.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is out of range, a pattern matches nothing, or no layer is left to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float | Callable[[int], float] = 0.01,
        fisher: str = "mc",
        likelihood: str | Likelihood = "auto",
        factor_every_n_steps: int = 10,
        inverse_every_n_steps: int = 20,
        warmup_steps: int = 10,
        ema_decay: float = 0.95,
        kl_clip: float | None = 0.03,
        inverse: str = "cholesky",
        rule: str = "natural",
        weight_sharing: str = "expand",
        max_factor_dim: int | None = 10_000,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        settings = Settings(
            damping=damping,
            fisher=fisher,
            likelihood=likelihood,
            factor_every_n_steps=factor_every_n_steps,
            inverse_every_n_steps=inverse_every_n_steps,
            warmup_steps=warmup_steps,
            ema_decay=ema_decay,
            kl_clip=kl_clip,
            inverse=inverse,
            rule=rule,
            weight_sharing=weight_sharing,
            max_factor_dim=max_factor_dim,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        self._start(model, settings)

    @classmethod
    def from_settings(cls, model: nn.Module, settings: Settings) -> KFC:
        """A preconditioner with settings that were checked before, as the callback has them."""
        kfc = cls.__new__(cls)
        kfc._start(model, settings)
        return kfc

    def _start(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self._model = model
        self._found = find_layers(
            model, settings.include, settings.exclude, settings.weight_sharing, settings.max_factor_dim
        )
        self._dropped: dict[str, str] = {}
        self._said: set[str] = set()
        self._recorder: Recorder | None = None
        self._losses: LossRecorder | None = None
        self._self_test: SelfTest | None = None
        self._self_test_done = False
        self._stepped = False
        self._micro_batch = 0
        self.step = 0
        self.events = Events()
        self.last_step: StepNumbers | None = None

    # What is covered.

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The preconditioned layers by module name."""
        return self._found.layers

    def coverage(self) -> Coverage:
        """Every parameter with how it is treated and why; prints as a table."""
        return coverage_of(self._model, self._found, INVERSES[self.settings.inverse])

    def _drop(self, layer: str, reason: str) -> None:
        self._dropped[layer] = reason
        before = set(self.layers)
        self._found.replace_by_parameters(layer, self._model, reason)
        # Their curvature begins with the next due step, which is no surprise.
        self._said |= set(self.layers) - before
        if distributed.rank() == 0:
            warnings.warn(
                f"KFC has no Kronecker factors for {layer!r}: {reason}. Its parameters get a diagonal curvature; "
                "add it to `exclude` to give them their plain gradient and to silence this.",
                stacklevel=2,
            )

    # A step, in the order of its parts.

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record what the forward and the loss of this (micro-)batch show, if this step is due; else do nothing.

        Compute the loss inside. Compiled code runs eagerly there, and only there.
        """
        self._begin_step_if_over()
        if not self.settings.schedule.factors_due(self.step):
            self._recorder = self._losses = None
            yield
            return
        self._recorder, self._losses = Recorder(), LossRecorder()
        test = self._prepare_self_test()
        waiting = set(test.waiting) if test is not None else set()
        handles = []
        try:
            for name, layer in self._layers_with_rows().items():
                wanted = functools.partial(test.direction, name) if test is not None and name in waiting else None
                keep_inputs = layer.inverse_type(INVERSES[self.settings.inverse]).wants_examples
                self._recorder.attach(name, layer.adapters, wanted, keep_inputs=keep_inputs)
            handles += self._attach_named_output(self._losses)
            with _eager_compiled_code(), self._losses:
                yield
        finally:
            self._recorder.detach()
            for handle in handles:
                handle.remove()

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
            LossNotRecognisedError: If the loss holds no recognised term.
            SelfTestError: If the first step shows that the rows of a layer do not explain its gradient.
            RuntimeError: If the step is due but its loss was not computed inside :meth:`capture`, or if its
                backward has been run.
        """
        if self._recorder is None and self.settings.schedule.factors_due(self.step):
            raise RuntimeError(
                f"KFC has recorded nothing at step {self.step}: compute the loss inside `with kfc.capture():`."
            )
        self.back_propagate(loss, loss_scale=loss_scale, loss_fraction=loss_fraction)
        if not accumulate:
            self.refresh()

    def back_propagate(self, loss: Tensor, *, loss_scale: float = 1.0, loss_fraction: float = 1.0) -> None:
        """The first half of :meth:`update`: send the seeds to the layers while the loss's graph lives."""
        if self._recorder is None or self._losses is None:
            return
        self.pause()
        try:
            with _full_precision(self._model), _norm_statistics_kept(self._model):
                statistics = self._statistics(loss, loss_scale, loss_fraction)
        finally:
            self.resume()
        # Finite or not is for all ranks to know together: refresh() looks at the sum over ranks.
        for name, entry in statistics.items():
            self._found.layers[name].add(entry)
        self._micro_batch += 1

    def refresh(self, optimizer: Optimizer | None = None) -> None:
        """The second half of :meth:`update`: fold statistics into the factors, and refresh the inverses, where due.

        Args:
            optimizer: Only for the layers whose parameters this optimizer steps; None for all.
        """
        if not self.settings.schedule.factors_due(self.step) and not self.settings.schedule.inverses_due(self.step):
            return
        rates = None if optimizer is None else _learning_rates(optimizer)
        layers = [layer for layer in self.layers.values() if rates is None or _rate_of(layer, rates) is not None]
        with _full_precision(self._model):
            self._fold_pending(layers)
            if self.settings.schedule.inverses_due(self.step):
                self._refresh_inverses([layer for layer in layers if layer.factorised_at != self.step])
            self._fold_second_moments(layers)

    def precondition(self, lr: float | None = None, *, optimizer: Optimizer | None = None) -> None:
        """Replace the gradients of the covered parameters by their updates.

        Args:
            lr: The learning rate of this step, for the KL clip.
            optimizer: Instead of ``lr``: the optimizer, each of whose parameter groups has a learning rate; only
                its own parameters' gradients are replaced.

        Raises:
            ValueError: If neither is given, or both are.
        """
        if (lr is None) == (optimizer is None):
            raise ValueError(
                "precondition() takes either lr=... or optimizer=..., to know the step that the KL clip bounds."
            )
        self.refresh(optimizer)
        rates = None if optimizer is None else _learning_rates(optimizer)
        ready: list[tuple[Layer, Tensor, float]] = []
        unexplained: list[str] = []
        finite = True
        for layer in self.layers.values():
            rate = lr if rates is None else _rate_of(layer, rates)
            gradients = layer.gradients()
            if rate is None or gradients is None:
                continue
            if not layer.averages:
                unexplained.append(layer.name)
            if layer.inverse is None or tuple(gradients) != layer.roles:
                continue
            matrix = layer.adapter.matrix(gradients)
            ready.append((layer, matrix.to(torch.promote_types(matrix.dtype, torch.float32)), rate))
        with torch.no_grad():
            if self.settings.schedule.factors_due(self.step):
                finite = all(bool(torch.isfinite(matrix).all()) for _, matrix, _ in ready)
                self._say_unexplained(unexplained)
            if finite:
                self._replace_gradients(ready)
            else:
                self.events.nonfinite_gradients += 1
        self._stepped = True

    def _say_unexplained(self, names: Sequence[str]) -> None:
        """Warn once of each layer that has a gradient, but no curvature although a step was due."""
        new = [name for name in names if name not in self._said]
        if not new or self.events.nonfinite_statistics:
            return
        self._said.update(new)
        if distributed.rank() == 0:
            warnings.warn(
                f"KFC has no curvature for {', '.join(map(repr, new))}: their gradients come from no recorded loss "
                "term through a recorded forward, and stay as they are. Likely causes: a part of the loss that is not "
                "recognised (name its likelihood), or activation checkpointing with use_reentrant=True (pass "
                "use_reentrant=False). Add them to `exclude` to silence this.",
                stacklevel=3,
            )

    def pause(self) -> None:
        """Record nothing until :meth:`resume`: a backward re-runs checkpointed forwards, which are none of ours."""
        self._set_paused(True)

    def resume(self) -> None:
        """Record again, if the capture is still open."""
        self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        if self._recorder is not None and self._losses is not None:
            self._recorder.paused = self._losses.paused = paused

    # The parts of a step.

    def _layers_with_rows(self) -> dict[str, Layer]:
        return {name: layer for name, layer in self.layers.items() if layer.adapter.has_rows}

    def _begin_step_if_over(self) -> None:
        if self._stepped:
            self.step += 1
            self._stepped = False
            self._micro_batch = 0

    def _prepare_self_test(self) -> SelfTest | None:
        if self._self_test is None and not self._self_test_done:
            self._self_test = SelfTest(self._layers_with_rows(), self._generator(torch.device("cpu"), stream=1))
        return self._self_test

    def _attach_named_output(self, losses: LossRecorder) -> list[Any]:
        likelihood = self.settings.likelihood
        if not isinstance(likelihood, Likelihood) or likelihood.output_of is None:
            return []
        modules = dict(self._model.named_modules())
        if likelihood.output_of not in modules:
            raise ValueError(
                f"likelihood names the logits as the output of {likelihood.output_of!r}, but the model has no such "
                f"module. Its modules are: {', '.join(name for name in modules if name)}."
            )
        hook = named_output_hook(likelihood, losses)
        return [modules[likelihood.output_of].register_forward_hook(hook)]

    def _statistics(self, loss: Tensor, loss_scale: float, loss_fraction: float) -> dict[str, Statistics]:
        assert self._recorder is not None
        assert self._losses is not None
        terms, recorded = list(self._losses.terms), list(self._recorder.calls)
        calls = recorded + [
            parameter_call(name, layer.adapter)
            for name, layer in self.layers.items()
            if not layer.adapter.has_rows and layer.adapter.own_parameters()
        ]
        kept = weighted_terms(loss, self._wanted(terms), loss_scale=loss_scale, loss_fraction=loss_fraction)
        test = self._self_test
        examples = self._example_gradients({call.layer for call in recorded if call.inputs is not None})
        if kept:
            if not all(bool(torch.isfinite(w.term.logits).all() and torch.isfinite(w.weights).all()) for w in kept):
                self.events.nonfinite_statistics += 1
                return {}
            generator = self._generator(kept[0].term.logits.device)
            scale = 1.0 if self.settings.fisher == "empirical" else seed_scale(kept)
            found = back_propagate(seed_passes(kept, self.settings.fisher, generator), calls, scale, test, examples)
        elif self.settings.fisher == "empirical":
            found = empirical_statistics_of_loss(
                loss, calls, loss_scale=loss_scale, loss_fraction=loss_fraction, test=test, examples=examples
            )
        else:
            raise LossNotRecognisedError(self._unrecognised(terms))
        # A term that this loss does not hold may belong to a later loss of the same training step.
        self._losses.terms[:] = [term for term in terms if all(term is not w.term for w in kept)]
        counted = self._recorder.counted
        if test is not None:
            self._conclude_self_test(test)
        statistics: dict[str, Statistics] = {}
        for index, entry in found.items():
            name = calls[index].layer
            if index < len(recorded):
                # A later loss through the same call adds to G alone: the call's input rows are in A already.
                entry = entry.without_means() if index in counted else entry
                counted.add(index)
            statistics[name] = statistics[name] + entry if name in statistics else entry
        return {name: entry for name, entry in statistics.items() if name in self.layers}

    def _example_gradients(self, layers: Iterable[str]) -> dict[str, ExampleGradients]:
        due = self.settings.schedule.inverses_due(self.step)
        return {
            name: layer.collect_examples(basis_changes=due and layer.factorised_at != self.step)
            for name, layer in self.layers.items()
            if name in layers
        }

    def _conclude_self_test(self, test: SelfTest) -> None:
        for name in test.never_called:
            if name in self.layers:  # else another part of its module took it along
                self._drop(name, "its weight is used without calling the module")
        test.never_called.clear()
        test.waiting[:] = [name for name in test.waiting if name in self.layers]
        if not test.waiting:
            self._self_test, self._self_test_done = None, True

    def _wanted(self, terms: list[LossTerm]) -> list[LossTerm]:
        likelihood = self.settings.likelihood
        if likelihood == "auto":
            return terms
        if isinstance(likelihood, Likelihood):
            if likelihood.output_of is not None:
                return [term for term in terms if term.value_edge is None]
            return [term for term in terms if isinstance(term.likelihood, type(likelihood))]
        return [term for term in terms if term.likelihood.name == likelihood]

    def _unrecognised(self, terms: list[LossTerm]) -> str:
        seen = ", ".join(sorted({term.function for term in terms})) or "none"
        return (
            "KFC recognised no term of the loss "
            f"(likelihood={self.settings.likelihood!r}; loss functions seen in this step: {seen}). "
            "It knows cross_entropy, nll_loss, binary_cross_entropy_with_logits and mse_loss, as functions or modules. "
            "For another loss, name the likelihood and the module whose output is its logits, for example "
            "likelihood=Categorical(output_of='head'), or choose fisher='empirical'."
        )

    def _generator(self, device: torch.device, stream: int = 0) -> torch.Generator:
        """A generator that depends on seed, rank, step and micro-batch alone, so that a resumed run draws the same."""
        parts = (self.settings.seed, distributed.rank(), self.step, self._micro_batch, stream)
        mixed = 0
        for part in parts:
            # The multiplier of Knuth's MMIX generator: neighbouring steps get unrelated seeds.
            mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        return torch.Generator(device).manual_seed(mixed)

    def _fold_pending(self, layers: Sequence[Layer]) -> None:
        pending = {layer.name: layer.pending for layer in layers if layer.pending is not None}
        for layer in layers:
            layer.pending = None
        for name, statistics in distributed.reduce_statistics(pending).items():
            if not statistics.is_finite():
                self.events.nonfinite_statistics += 1
            elif not self._found.layers[name].fold(statistics, self.settings.ema_decay):
                self.events.restarted_layers += 1

    def _refresh_inverses(self, layers: Sequence[Layer]) -> None:
        damping = value_at(self.settings.damping, self.step)
        for layer in layers:
            if not layer.averages:
                continue
            try:
                layer.factorise(INVERSES[self.settings.inverse], damping, self.step)
            except FactorisationError as error:
                self.events.failed_factorisations += 1
                kept = "the last good inverse is kept" if layer.inverse is not None else "its plain gradient is used"
                if distributed.rank() == 0:
                    warnings.warn(f"KFC at step {self.step}, layer {layer.name!r}: {error}; {kept}.", stacklevel=2)

    def _fold_second_moments(self, layers: Sequence[Layer]) -> None:
        moments = {}
        for layer in layers:
            if layer.examples is not None and layer.examples.incomplete:
                warnings.warn(
                    f"KFC layer {layer.name!r}: its input was changed in place after its forward, so that "
                    "inverse='ekfac' has no gradients of single examples there and goes on with the "
                    "eigenvalues it has. Make that operation out of place, or use inverse='eigh'.",
                    stacklevel=2,
                )
            moments[layer.name] = layer.take_second_moment()
        statistics = {name: Statistics({}, {"S": S}, 0) for name, S in moments.items() if S is not None}
        for name, entry in distributed.reduce_statistics(statistics).items():
            if entry.is_finite():
                self._found.layers[name].fold_second_moment(entry.sums["S"], self.settings.ema_decay)
            else:
                self.events.nonfinite_statistics += 1

    def _replace_gradients(self, ready: Sequence[tuple[Layer, Tensor, float]]) -> None:
        damping = value_at(self.settings.damping, self.step)
        inverses = [layer.inverse.at_damping(damping) for layer, _, _ in ready if layer.inverse is not None]
        gradients, rates = [g for _, g, _ in ready], [rate for _, _, rate in ready]
        with _full_precision(self._model):
            result = natural_step(gradients, inverses, rates, self.settings.kl_clip)
        self.events.nonfinite_updates += len(result.failed)
        for (layer, _, _), update in zip(ready, result.updates, strict=True):
            layer.write(update)
        self.last_step = StepNumbers(self.step, damping, result.clip, result.quadratic / 2)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain tensors, numbers, strings, dicts and lists."""
        return {
            "version": STATE_VERSION,
            "step": self.step + int(self._stepped),
            "layers": {name: layer.state_dict() for name, layer in self._found.layers.items()},
            "dropped": dict(self._dropped),
            "self_test_done": self._self_test_done,
            "events": self.events.state_dict(),
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
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"KFC cannot read a state of version {state.get('version')!r}, only {STATE_VERSION}.")
        self.step = int(state["step"])
        self._stepped = False
        for name, reason in state["dropped"].items():
            if name in self._found.layers:
                self._dropped[name] = reason
                self._found.replace_by_parameters(name, self._model, reason)
        self._self_test, self._self_test_done = None, bool(state["self_test_done"])
        self.events.load_state_dict(state["events"])
        problems = [
            f"layer {name!r} of the checkpoint is not in the model"
            for name in state["layers"]
            if name not in self._found.layers
        ]
        for name, layer in self._found.layers.items():
            if name not in state["layers"]:
                problems.append(f"layer {name!r} is not in the checkpoint and starts anew")
                continue
            if not layer.adapter.own_parameters():
                continue
            reason = layer.load_state_dict(state["layers"][name], INVERSES[self.settings.inverse])
            if reason is not None:
                problems.append(f"layer {name!r} starts anew: {reason}")
        return problems


def _learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """The learning rate of each parameter's group, by ``id``."""
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _rate_of(layer: Layer, rates: Mapping[int, float]) -> float | None:
    """A layer's learning rate, or None where the optimizer does not step all of it.

    Where its parameters are spread over groups, that of the weight's group.
    """
    own = [rates.get(id(parameter)) for parameter in layer.adapter.own_parameters().values()]
    return None if not own or any(rate is None for rate in own) else own[0]


def _full_precision(model: nn.Module) -> torch.autocast:
    """A plain loop may call us under autocast, which would form factors and updates in half precision."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


@contextlib.contextmanager
def _eager_compiled_code() -> Iterator[None]:
    """Run compiled code eagerly, so that hooks fire and the loss is seen; what is compiled stays compiled."""
    if "torch._dynamo" not in sys.modules:
        # Nothing can have been compiled, and importing the compiler would cost seconds.
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _norm_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Put batch norm's running statistics back: under activation checkpointing a backward runs forwards again."""
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
        for buffer in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for buffer, value in kept:
            # Through .data: autograd holds these buffers too, and objects to a write that it counts. Batch norm's own
            # writes are not counted, so that a changed buffer cannot be told by its version.
            buffer.data.copy_(value)
