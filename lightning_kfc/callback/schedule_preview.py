"""Preview the learning rates and momenta of schedulers, on copies that step a stand-in for the optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_kfc.utilities.torch_internals import custom_scale, inner_schedulers, mark_as_stepped

#: The longest preview, in steps; it takes some 0.1 seconds.
MOST_STEPS = 5_000
#: Modules whose schedulers are copied and stepped; other code may have side effects.
KNOWN = ("torch.optim.lr_scheduler", "torch.optim.swa_utils")


@dataclass(frozen=True)
class Schedule:
    """A scheduler of an optimizer.

    Attributes:
        scheduler: The scheduler; a preview steps a copy of it.
        every: Optimizer steps for one step of the scheduler; NaN or infinity if unknown.
    """

    scheduler: Any
    every: float = 1.0


@dataclass(frozen=True)
class Planned:
    """The highest learning rate and momentum of some parameter groups, over the optimizer steps.

    Attributes:
        rates: The rate at each step.
        momenta: The momentum at each step; 0 for optimizers without momentum.
        whole: Whether the run ends with the last of these steps.
    """

    rates: Sequence[float]
    momenta: Sequence[float]
    whole: bool


def schedules_of(trainer: Any, pl_module: Any, optimizer: Optimizer) -> list[Schedule]:
    """The schedules of one of a trainer's optimizers."""
    # The module's own code may step them at any time.
    by_lightning = pl_module.automatic_optimization and is_lightnings_own(pl_module, "lr_scheduler_step")
    epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    # The last batch of an epoch always steps.
    epoch = math.ceil(epoch) if epoch < math.inf else epoch
    found = []
    for config in trainer.lr_scheduler_configs:
        if getattr(config.scheduler, "optimizer", None) is optimizer:
            every = config.frequency * (1.0 if config.interval == "step" else epoch)
            found.append(Schedule(config.scheduler, every if by_lightning else math.nan))
    return found


def is_lightnings_own(pl_module: Any, method: str) -> bool:
    """Whether a module inherits a method from its package, ``lightning`` or ``pytorch_lightning``."""
    package = getattr(type(pl_module), method).__module__.partition(".")[0]
    return package in ("lightning", "pytorch_lightning")


class _StandIn:
    """The attributes of an optimizer that schedulers use, without parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = [
            {key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups
        ]
        self.param_groups = copy.deepcopy(self.param_groups)
        self.defaults = dict(optimizer.defaults)

        def step() -> None: ...

        self.step = step
        mark_as_stepped(self)


def preview(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], schedules: Iterable[Schedule], steps: float
) -> Planned | None:
    """The learning rates and momenta of the next steps; None if a preview could have side effects.

    Args:
        optimizer: The optimizer; neither it nor its schedulers are changed.
        groups: Its parameter groups of interest.
        schedules: All of its schedulers.
        steps: The remaining optimizer steps; infinity if unknown.
    """
    schedules = list(schedules)
    if not all(math.isfinite(schedule.every) and _is_known(schedule.scheduler) for schedule in schedules):
        return None
    wanted = [i for i, group in enumerate(optimizer.param_groups) if any(group is other for other in groups)]
    stand_in = _StandIn(optimizer)
    memo: dict[int, Any] = {id(optimizer): stand_in}
    try:
        copies = [(copy.deepcopy(schedule.scheduler, memo), schedule.every) for schedule in schedules]
    except Exception:  # a user's attribute may raise anything when it is copied
        return None
    count = int(min(steps, MOST_STEPS))
    rates, momenta = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(count):
            chosen = [stand_in.param_groups[i] for i in wanted]
            rates.append(max(float(group["lr"]) for group in chosen))
            momenta.append(max(float(group.get("momentum") or 0) for group in chosen))
            try:
                for scheduler, every in copies:
                    if math.floor((step + 1) / every) > math.floor(step / every):
                        scheduler.step()
            except Exception:  # a scheduler past its end; training will raise the same
                return Planned(rates, momenta, False)
    return Planned(rates, momenta, count == steps) if count else None


def _is_known(scheduler: Any) -> bool:
    """Whether a step of a scheduler runs torch's code alone, and depends on no metric."""
    if type(scheduler).__module__ not in KNOWN or type(scheduler).__name__ == "ReduceLROnPlateau":
        return False
    if hasattr(scheduler, "lr_lambdas") or custom_scale(scheduler) is not None:
        return False
    return all(_is_known(inner) for inner in inner_schedulers(scheduler))
