"""Running statistics of batch norm that belong to averaged weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_kfc.utilities.torch_internals import AnyBatchNorm, plain_name

#: The power of the polynomial-decay average of the first steps: the average looks back over about a tenth of them. The
#: mean of all of them, power 0, would trail weights that still improve fast.
POWER = 9

Steps = TypeVar("Steps", float, Tensor)


def newest_share(steps: Steps, decay: float, power: int = POWER) -> Steps:
    r"""The weight :math:`\max((1 + \eta)/(k + \eta), 1 - \text{decay})` with which step k enters an average.

    It begins as the polynomial-decay average of Shamir and Zhang (2013).

    Args:
        steps: The number of averaged steps k, this one included, at least 1.
        decay: The share of the average that each later step keeps, at least 0 and below 1.
        power: The power :math:`\eta`, at least 0; 0 begins as the mean of all steps.
    """
    share = (1 + power) / (steps + power)
    return share.clamp(min=1 - decay) if isinstance(share, Tensor) else max(share, 1 - decay)


class AveragedStatistics:
    """Averages of every batch norm's batch statistics, with the weights of the averaged parameters.

    The batches of a step are those of the weights before it: the statistics of step k + 1 enter with the share of the
    weights of step k, and those of the initial weights are dropped. They are computed from the change of the running
    statistics. Means and standard deviations are averaged, since both scale with the weights before the layer.
    The averages depend neither on the layer's momentum nor on its initial statistics. Instance norm and statistics of
    half precision are left alone.

    Args:
        module: The module; layers that are added later are left out.
        decay: The share of the average that each optimizer step keeps, at least 0 and below 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, AnyBatchNorm]] = defaultdict(dict)
        layer: Any
        for name, layer in module.named_modules():
            if _has_statistics(layer):
                groups[layer.running_mean.device, layer.running_mean.dtype][plain_name(name)] = layer
        self._groups = [_Group(layers, decay) for layers in groups.values()]

    @property
    def any(self) -> bool:
        """Whether there are layers."""
        return bool(self._groups)

    def update(self, stepped: Set[int], averaged: Set[int]) -> None:
        """Mix in the batches since the last step of each layer's optimizer; their number may differ between layers.

        A layer in evaluation mode keeps its own statistics, as a teacher's. One whose parameters are not averaged is
        mixed at each step.

        Args:
            stepped: The parameters that the present step moved, by ``id``.
            averaged: All that are averaged.
        """
        for group in self._groups:
            group.update(stepped, averaged)

    def broadcast(self, send: Callable[[Tensor], Tensor]) -> None:
        """Replace the averages by those of another rank. Collective: call on every rank."""
        for group in self._groups:
            for name in ("mean", "deviation", "updates"):
                own = getattr(group, name)
                setattr(group, name, send(own).to(own.device))

    def values(self) -> list[tuple[Tensor, Tensor]]:
        """Each running statistic, with its average."""
        return [pair for group in self._groups for pair in group.values()]

    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors in :meth:`state_dict`, and of the running statistics that train."""
        running = (group.running() for group in self._groups)
        return sum(3 * (mean.nbytes + variance.nbytes) + seen.nbytes for mean, variance, seen in running)

    def state_dict(self) -> dict[str, Any]:
        """By layer: ``mean``, ``deviation``, the number of ``updates``, and the running statistics ``before``."""
        return {name: state for group in self._groups for name, state in group.state().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; layers that are not in it, or have another size, start again."""
        for group in self._groups:
            group.load(state)


class _Group:
    """The layers of one device and one precision, their channels concatenated for few operations."""

    def __init__(self, layers: dict[str, AnyBatchNorm], decay: float) -> None:
        self._layers, self._decay = layers, decay
        self._sizes = [layer.num_features for layer in layers.values()]
        self._parameters = [{id(parameter) for parameter in layer.parameters()} for layer in layers.values()]
        self.before = self.running()
        first = self.before[0]
        self._layer_of = torch.arange(len(layers)).repeat_interleave(torch.tensor(self._sizes)).to(first.device)
        self.mean, self.deviation = torch.zeros_like(first), torch.zeros_like(first)
        self.updates = first.new_zeros(len(layers))
        # What a step has in common with the one before.
        self._momenta: list[float | None] = []
        self._momentum = first
        self._due: list[bool] = []
        self._now = self._layer_of

    def running(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of all channels, and each layer's number of batches."""
        layers: Any = self._layers.values()
        means, variances = [layer.running_mean for layer in layers], [layer.running_var for layer in layers]
        return torch.cat(means), torch.cat(variances), torch.stack([layer.num_batches_tracked for layer in layers])

    def update(self, stepped: Set[int], averaged: Set[int]) -> None:
        mean, variance, seen = self.running()
        mean_before, variance_before, seen_before = self.before
        due = [
            layer.training and (averaged.isdisjoint(own) or not own.isdisjoint(stepped))
            for layer, own in zip(self._layers.values(), self._parameters, strict=True)
        ]
        if due != self._due:
            self._due, self._now = due, torch.tensor(due).to(seen.device)
        now, channels = self._now, self._now[self._layer_of]
        means, variances = torch.where(channels, mean, mean_before), torch.where(channels, variance, variance_before)
        self.before = means, variances, torch.where(now, seen, seen_before)
        batches, total = (seen - seen_before).to(mean.dtype), seen.clamp(min=1).to(mean.dtype)
        momenta = [layer.momentum for layer in self._layers.values()]
        if momenta != self._momenta:
            # NaN stands for momentum None: the mean over all batches.
            self._momenta = momenta
            self._momentum = mean.new_tensor([float("nan") if m is None else m for m in momenta])
        kept = torch.where(self._momentum.isnan(), 1 - batches / total, (1 - self._momentum) ** batches)
        moved = now & (batches > 0) & (kept < 1)
        self.updates += moved
        newest = newest_share((self.updates - 1).clamp(min=1), self._decay)
        weights = torch.where(moved, newest, 0)[self._layer_of]
        beyond = torch.where(moved, kept / (1 - kept), 0)[self._layer_of]
        self.mean.lerp_(mean + beyond * (mean - mean_before), weights)
        of_batches = variance + beyond * (variance - variance_before)
        self.deviation.lerp_(of_batches.clamp(min=0).sqrt(), weights)

    def values(self) -> list[tuple[Tensor, Tensor]]:
        known = (self.updates > 0)[self._layer_of]
        mean, variance, _ = self.running()
        means = self._split(torch.where(known, self.mean, mean))
        variances = self._split(torch.where(known, self.deviation**2, variance))
        layers: Any = self._layers.values()
        return [
            pair
            for layer, *own in zip(layers, means, variances, strict=True)
            for pair in zip((layer.running_mean, layer.running_var), own, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        means, variances, seen = self.before
        parts = zip(self._layers, *map(self._split, (self.mean, self.deviation, means, variances)), seen, strict=True)
        return {
            name: {"mean": mean, "deviation": deviation, "updates": int(updates), "before": before}
            for (name, mean, deviation, *before), updates in zip(parts, self.updates.tolist(), strict=True)
        }

    def load(self, state: dict[str, Any]) -> None:
        self.before = self.running()
        means, variances, seen = self.before
        rows = zip(self._layers, *map(self._split, (self.mean, self.deviation, means, variances)), seen, strict=True)
        for number, (name, mean, deviation, *before) in enumerate(rows):
            if name in state and state[name]["mean"].shape == mean.shape:
                mean.copy_(state[name]["mean"])
                deviation.copy_(state[name]["deviation"])
                for own, saved in zip(before, state[name].get("before", ()), strict=False):
                    own.copy_(saved)
                self.updates[number] = state[name]["updates"]

    def _split(self, channels: Tensor) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(channels, self._sizes)


def _has_statistics(layer: nn.Module) -> bool:
    """Whether a layer is an initialised batch norm with running statistics of single precision or better."""
    if not isinstance(layer, AnyBatchNorm) or not layer.track_running_stats:
        return False
    mean, seen = layer.running_mean, layer.num_batches_tracked
    if mean is None or seen is None or nn.parameter.is_lazy(mean):
        return False
    return mean.dtype in (torch.float32, torch.float64)
