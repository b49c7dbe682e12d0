"""Evaluates the loss of a training step again, so that the run does not notice."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_kfc.batches import Examples
from lightning_kfc.distributed import is_sharded
from lightning_kfc.kfc import KFC
from lightning_kfc.part_law import NotDivisibleError

#: Values of a module's attributes that a training step may change in place, or replace.
PLAIN = (bool, int, float, complex, str, bytes, list, dict, set, tuple, type(None))


def why_no_replay(trainer: Any, module: Any) -> str | None:
    """Why the loss of a training step cannot be evaluated again, or None where it can."""
    if not module.automatic_optimization:
        return "manual optimization"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "a training_step that takes batches out of a dataloader_iter itself"
    if any(map(is_sharded, module.parameters())):
        return "parameters that are sharded over ranks"
    return None


class Replay:
    """The batches of the present optimizer step, and how the loss on each is had again.

    Args:
        trainer: The trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer = trainer
        self._module = module
        self._batches: list[tuple[Any, int]] = []

    def keep(self, batch: Any, batch_idx: int) -> None:
        """Keep a micro-batch, by reference."""
        self._batches.append((batch, batch_idx))

    def clear(self) -> None:
        """Let go of the batches."""
        self._batches = []

    def evaluations(self) -> list[Callable[[], float]]:
        """For each micro-batch, what evaluates its share of the step's loss."""

        def evaluation(batch: Any, batch_idx: int) -> Callable[[], float]:
            return lambda: self._loss(batch, batch_idx) / self._trainer.accumulate_grad_batches

        return [evaluation(batch, batch_idx) for batch, batch_idx in self._batches]

    def capture(
        self, kfc: KFC, around: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> contextlib.AbstractContextManager[None]:
        """The engine's capture of the present batch, a part of which may be evaluated in its place.

        Args:
            kfc: The engine.
            around: A context for each such evaluation.
        """
        batch, batch_idx = self._batches[-1]
        try:
            examples = Examples(batch)
        except NotDivisibleError as reason:
            return kfc.capture(whole=str(reason))

        def evaluate(part: Tensor) -> Tensor | None:
            with around():
                loss = self._output(examples.part(part), batch_idx)
            return None if loss is None else loss / self._trainer.accumulate_grad_batches

        return kfc.capture(evaluate, examples=examples.count)

    def _loss(self, batch: Any, batch_idx: int) -> float:
        loss = self._output(batch, batch_idx)
        # A step that Lightning skips has no loss: nothing was expected of it either.
        return float(loss) if loss is not None else float("nan")

    def _output(self, batch: Any, batch_idx: int) -> Tensor | None:
        # Lightning's own rule for what it passes.
        numbered = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        arguments = (batch, batch_idx) if numbered else (batch,)
        with unnoticed(self._trainer, self._module), self._trainer.precision_plugin.forward_context():
            output = self._module.training_step(*arguments)
        loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
        return loss


@contextlib.contextmanager
def unnoticed(trainer: Any, module: Any) -> Iterator[None]:
    """Within: what the module logs goes nowhere. Afterwards: its metrics and plain attributes are as they were.

    Buffers and random streams are the engine's to keep (:func:`lightning_kfc.isolation.leaving_no_trace`).
    """
    with _silent(trainer, module), _metrics_kept(module), _attributes_kept(module):
        yield


@contextlib.contextmanager
def _silent(trainer: Any, module: Any) -> Iterator[None]:
    loggers, trainer.loggers = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
    silenced = {name: module.__dict__.get(name) for name in ("log", "log_dict", "print")}
    for name in silenced:
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name, own in silenced.items():
            if own is None:
                module.__dict__.pop(name, None)
            else:
                object.__setattr__(module, name, own)


@contextlib.contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    kept = []
    for metric in module.modules():
        if isinstance(metric, Metric):
            values = {name: value for name, value in metric.__dict__.items() if _is_metric_state(metric, name)}
            kept.append((metric, apply_to_collection(values, Tensor, torch.clone)))
    try:
        yield
    finally:
        for metric, values in kept:
            metric.__dict__.update(values)


def _is_metric_state(metric: Metric, name: str) -> bool:
    return name in metric._defaults or name in ("_update_count", "_computed", "_forward_cache")


@contextlib.contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put plain attributes back (counters, and lists of the step's outputs), the containers in place."""
    kept = [
        (part, name, value, copy.copy(value))
        for part in module.modules()
        for name, value in part.__dict__.items()
        if type(value) in PLAIN and not name.startswith("_")
    ]
    try:
        yield
    finally:
        for part, name, value, contents in kept:
            if isinstance(value, list):
                value[:] = contents
            elif isinstance(value, (dict, set)) and value != contents:
                value.clear()
                value.update(contents)
            part.__dict__[name] = value
