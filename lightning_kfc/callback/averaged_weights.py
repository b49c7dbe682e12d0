"""An exponential average of the weights, which validation and checkpoints use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kfc.callback.averaged_statistics import AveragedStatistics, newest_share
from lightning_kfc.callback.notices import Notices
from lightning_kfc.callback.options import KFCOptions
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.monitoring.events import listed
from lightning_kfc.utilities.torch_internals import interpolate, plain_name

#: Callbacks of Lightning that average weights themselves; subclasses count.
OTHER_AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}


@dataclass
class _Average:
    parameter: Tensor
    value: Tensor
    updates: int = 1

    def fits(self) -> bool:
        """Whether the parameter has not been replaced in place by another one."""
        return _alike(self.parameter, self.value) and self.parameter.device == self.value.device


class _SetAside(NamedTuple):
    """A tensor of the module that holds its average, and the value that trains."""

    tensor: Tensor
    training: Tensor
    average: Tensor


class AveragedWeights:
    r"""Averages the weights that optimizers update, and swaps them with the weights that train.

    After an optimizer's k-th step, its parameters enter their averages with weight
    :math:`\max(10/(k + 9), 1 - \text{decay})`: the initial weights do not count, the first steps are soon forgotten.
    A parameter that is added later starts at its own value. Parameters without an optimizer, such as those of a
    teacher, are not averaged. Batch norm gets the statistics of the averaged weights
    (:class:`~lightning_kfc.callback.averaged_statistics.AveragedStatistics`). Those of the newest weights are known
    after the next forward alone, so that in a module with batch norm weights enter the average with the next step.

    Args:
        module: The module that trains.
        decay: The share of the average that each optimizer step keeps, at least 0 and below 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._averages: dict[int, _Average] = {}
        # With batch norm, the weights of the last forward, until the step that follows it.
        self._begun: dict[int, Tensor] = {}
        self._statistics = AveragedStatistics(module, decay)
        # While the module holds averages.
        self._set_aside: list[_SetAside] | None = None
        self._replaced: list[tuple[Any, str, Any]] = []
        self._notices = Notices()

    @torch.no_grad()
    def step_begins(self, optimizer: Optimizer) -> None:
        """With batch norm, keep the weights before an optimizer's step, whose statistics the last forward has told.

        Args:
            optimizer: The optimizer, before its step.
        """
        if self._set_aside is None and self._statistics.any:
            averaged = [p for group in optimizer.param_groups for p in group["params"] if self._has_average(p)]
            # An optimizer that evaluates its closure again has already moved the weights.
            self._begun |= {id(p): p.detach().clone() for p in averaged if id(p) not in self._begun}

    @torch.no_grad()
    def update(self, optimizer: Optimizer) -> None:
        """Mix the weights after an optimizer's step into the averages, with batch norm those before it.

        Skipped steps do not count.

        Args:
            optimizer: The optimizer, after its step and before its gradients are cleared.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        begun = {id(p): self._begun.pop(id(p)) for p in parameters if id(p) in self._begun}
        # A step in a validation is that of other weights.
        if self._set_aside is not None or all(p.grad is None for p in parameters) or _was_skipped(optimizer):
            return
        known = [p for p in parameters if self._has_average(p)]
        known_ids = set(map(id, known))
        new = [p for p in parameters if p.grad is not None and id(p) not in known_ids]
        # Another optimizer's parameters, such as those of a probe, have no average. Most steps have none to look up.
        own = set(map(id, self._module.parameters())) if new else set()
        started = {id(p): _Average(p, p.detach().clone()) for p in new if id(p) in own}
        alike: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for p in known:
            average = self._averages[id(p)]
            # The weights before the k-th step are those of the step before.
            weight = newest_share(average.updates + (id(p) not in begun), self._decay)
            average.updates += 1
            averages, values = alike[p.device, p.dtype, weight]
            averages.append(average.value)
            values.append(begun.get(id(p), p.detach()))
        for (_, _, weight), (averages, values) in alike.items():
            interpolate(averages, values, weight)
        self._averages |= started
        if alike or started:
            self._statistics.update(set(map(id, parameters)), self._averages.keys())

    def _has_average(self, parameter: Tensor) -> bool:
        average = self._averages.get(id(parameter))
        return average is not None and average.fits()

    def follow_structure(self) -> None:
        """Include added batch norm layers, and forget removed parameters."""
        state = self._statistics.state_dict()
        self._statistics = AveragedStatistics(self._module, self._decay)
        self._statistics.load_state_dict(state)
        present = set(map(id, self._module.parameters()))
        self._averages = {key: average for key, average in self._averages.items() if key in present}

    def put_in(self, broadcast: Callable[[Tensor], Tensor] | None = None) -> None:
        """Put the averages into the module, if there are any, and set aside the weights that train.

        Args:
            broadcast: Sends a tensor of rank zero to all ranks, for equal running statistics. Collective.
        """
        if self._set_aside is not None or not self._averages:
            return
        # Validation may run in inference mode, and training cannot use inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            if broadcast is not None:
                self._statistics.broadcast(broadcast)
            present = set(map(id, self._module.parameters()))
            pairs = [(a.parameter, a.value) for key, a in self._averages.items() if key in present and a.fits()]
            pairs += self._statistics.values()
            # Complete before the first write: an interrupt may come at any point.
            self._set_aside = [_SetAside(tensor, tensor.detach().clone(), value) for tensor, value in pairs]
            _write(pairs)

    def take_out(self) -> None:
        """Restore the weights that train, bit for bit.

        Weights that other code has written since :meth:`put_in` stay as they are, and begin a new average.
        """
        if self._set_aside is None:
            return
        written = self._written()
        with torch.inference_mode(False), torch.no_grad():
            _write([(each.tensor, each.training) for each in self._set_aside if id(each.tensor) not in written])
        self._set_aside = None
        if not written:
            return
        self._averages = {key: average for key, average in self._averages.items() if key not in written}
        self._statistics = AveragedStatistics(self._module, self._decay)
        names = [plain_name(name) for name, p in self._module.named_parameters() if id(p) in written]
        self._notices.inform(
            f"KFCCallback: other code wrote {listed(names)} while the module held averaged weights. Training goes on "
            "from what was written, with a new average."
        )

    def _written(self) -> set[int]:
        """The ids of tensors that other code has written since :meth:`put_in`."""
        written = {id(each.tensor) for each in self._set_aside or () if not _holds(each.tensor, each.average)}
        # Forwards in training mode write the statistics of batch norm alone, which is no return to other weights.
        return written if written & self._averages.keys() else set()

    def attach(self, trainer: Any, active: Callable[[], bool]) -> None:
        """Have the module hold the averages during each validation and checkpoint, and from the end of training on.

        The methods of the trainer are replaced, since hooks of other callbacks and of the module may run before and
        after those of a callback: each swap of weights of their own begins and ends within ours.

        Args:
            trainer: The trainer.
            active: Returns whether the callback is among the trainer's callbacks.
        """
        send, fit_loop = trainer.strategy.broadcast, trainer.fit_loop
        self._replace(fit_loop.epoch_loop.val_loop, "run", active, send)
        self._replace(fit_loop, "on_run_end", active, send, stays=True)
        self._replace(trainer, "save_checkpoint", active)

    def _replace(
        self, owner: Any, name: str, active: Callable[[], bool], send: Any = None, *, stays: bool = False
    ) -> None:
        original = getattr(owner, name)

        def with_averages(*args: Any, **kwargs: Any) -> Any:
            # Other code may have wrapped a replacement, which then outlives the fit.
            if self._set_aside is not None or not (self._replaced and active()):
                return original(*args, **kwargs)
            try:
                self.put_in(send)
                return original(*args, **kwargs)
            finally:
                if not stays:
                    self.take_out()

        setattr(owner, name, with_averages)
        self._replaced.append((owner, name, with_averages))

    def detach(self) -> None:
        """Leave the trainer as it was."""
        for owner, name, replacement in self._replaced:
            if vars(owner).get(name) is replacement:
                delattr(owner, name)
        self._replaced.clear()

    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors in :meth:`state_dict`, once every trainable parameter has an average."""
        parameters = sum(p.nbytes for p in self._module.parameters() if p.requires_grad and not nn.parameter.is_lazy(p))
        return parameters + self._statistics.checkpoint_bytes()

    def description(self) -> str:
        """A sentence for the start-up report."""
        return (
            f"Validation and checkpoints use weights averaged over the last ~{round(1 / (1 - self._decay))} steps "
            f"(average_weights=None: off); {self.checkpoint_bytes() / 1e6:.3g} MB more in memory and checkpoints."
        )

    def state_dict(self) -> dict[str, Any]:
        """The weights that train, and the steps of each average; a checkpoint's module state holds the averages."""
        if not (self._averages or self._statistics.any):
            return {}
        written = self._written()
        set_aside = {id(each.tensor): each.training for each in self._set_aside or ()}
        averaged = self._averages.keys() - written
        named = {plain_name(name): p for name, p in self._module.named_parameters() if id(p) in averaged}
        running = {id(buffer) for buffer, _ in self._statistics.values()} - written
        buffers = {plain_name(name): buffer for name, buffer in self._module.named_buffers() if id(buffer) in running}
        return {
            "updates": {name: self._averages[id(p)].updates for name, p in named.items()},
            "training": {name: set_aside.get(id(t), t.detach()) for name, t in {**named, **buffers}.items()},
            "statistics": {} if written else self._statistics.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take the averages from the module, loaded from a checkpoint, and restore the weights that train.

        Args:
            state: The result of :meth:`state_dict`.

        Returns:
            The names of weights that the module does not have, or has in another shape.
        """
        own = {plain_name(name): tensor for name, tensor in self._module.named_parameters()}
        updates, problems, pairs = state["updates"], [], []
        buffers = {plain_name(name): tensor for name, tensor in self._module.named_buffers()}
        for name, value in state["training"].items():
            tensor = own.get(name, buffers.get(name))
            if tensor is None or nn.parameter.is_lazy(tensor) or tensor.shape != value.shape:
                problems.append(name)
                continue
            if name in own:
                self._averages[id(tensor)] = _Average(tensor, tensor.detach().clone(), updates[name])
            pairs.append((tensor, value))
        _write(pairs)
        self._statistics.load_state_dict(state["statistics"])
        return problems


def averaged_weights(callback: KFCOptions, trainer: Any, module: nn.Module) -> AveragedWeights | None:
    """A callback's average of the weights, attached to the trainer; None for no average.

    Of several callbacks only the last one averages: it runs after all reviews of a step.

    Args:
        callback: One of the trainer's callbacks.
        trainer: The trainer.
        module: The module that trains.
    """
    decay = callback.average_weights
    together = [c for c in trainer.callbacks if isinstance(c, KFCOptions) and c.average_weights is not None]
    if decay is None or together[-1] is not callback:
        return None
    if (reason := _reason_against(trainer, module)) is not None:
        rank_zero_info(f"KFCCallback does not average the weights: {reason}.")
        return None
    average = AveragedWeights(module, decay)
    average.attach(trainer, active=lambda: any(each is callback for each in trainer.callbacks))
    return average


def _reason_against(trainer: Any, module: nn.Module) -> str | None:
    """The reason not to average a trainer's weights; None without one."""
    for callback in trainer.callbacks:
        if OTHER_AVERAGES & {cls.__name__ for cls in type(callback).__mro__}:
            return f"{type(callback).__name__} averages them"
    for optimizer in trainer.optimizers:
        # The convention of schedule-free optimizers, which swap their own average in and out.
        if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
            return f"{type(optimizer).__name__} averages them, between its eval() and train()"
    if any(map(is_sharded, module.parameters())):
        return "they are sharded over ranks"
    return None


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether an optimizer that unscales its gradients itself found a value that is not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first one, without a new version for autograd."""
    for tensor, value in pairs:
        tensor.data.copy_(value)


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are of one shape and precision."""
    return first.shape == second.shape and first.dtype == second.dtype


def _holds(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor has exactly these elements, on any device; NaN equals NaN."""
    if not _alike(tensor, value):
        return False
    # Lightning moves the module to the CPU after the fit.
    value = value.to(tensor.device)
    return torch.equal(tensor, value) or torch.allclose(tensor, value, rtol=0, atol=0, equal_nan=True)
