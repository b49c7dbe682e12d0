"""Refuse, log and advise when fitting starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_kfc.callback.averaged_weights import AveragedWeights
from lightning_kfc.callback.optimizer_advice import OptimizerWarning, warning_for_run, warnings_for
from lightning_kfc.callback.schedule_preview import schedules_of
from lightning_kfc.curvature.coverage import wrapped
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.kfc import KFC
from lightning_kfc.monitoring.events import listed
from lightning_kfc.monitoring.messages import LOGGER
from lightning_kfc.utilities.torch_internals import plain_name

#: Strategies that run their own backward or hold parameters in flat buffers, with the way out.
REFUSED_STRATEGIES = {
    "FSDPStrategy": "use ModelParallelStrategy (FSDP2) instead",
    "DeepSpeedStrategy": "use DDPStrategy, or ModelParallelStrategy for sharding",
    "XLAFSDPStrategy": "use an XLA strategy without sharding",
}


def refuse_strategy(strategy: Any) -> None:
    """Raise a ValueError for a strategy that the callback cannot work with."""
    for cls in type(strategy).__mro__:
        if cls.__name__ in REFUSED_STRATEGIES:
            name, way_out = type(strategy).__name__, REFUSED_STRATEGIES[cls.__name__]
            raise ValueError(f"KFCCallback does not work with {name}: {way_out}.")


def refuse_optimizers(optimizers: Sequence[Any]) -> None:
    """Raise a ValueError for an optimizer that the callback cannot work with."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "KFCCallback does not work with LBFGS: it evaluates several points in a step and estimates its own "
                "curvature. Use SGD(lr=0.5, momentum=0.5), or train without the callback."
            )


def refuse_shared_folder(folder: str | None, folders: Sequence[str | None]) -> None:
    """Raise a ValueError where two callbacks would overwrite each other's report.

    Args:
        folder: The folder of one callback's report; None for no report.
        folders: The folders of all callbacks of the trainer.
    """
    if folder is not None and folders.count(folder) > 1:
        raise ValueError(f"two KFCCallbacks have logging.report_dir={folder!r}. Give each its own folder.")


def refuse_overlap(module: Any, engines: Sequence[tuple[str, KFC]]) -> None:
    """Raise a ValueError where two callbacks would precondition the same parameter.

    Args:
        module: The module that is trained.
        engines: The engines of all callbacks of the trainer, each with the callback's name.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    owners: dict[int, str] = {}
    for callback, kfc in engines:
        own = {id(parameter) for layer in kfc.layers.values() for parameter in layer.trained_parameters().values()}
        for key in names:
            if key in own and owners.setdefault(key, callback) != callback:
                raise ValueError(
                    f"{owners[key]} and {callback} would both precondition {plain_name(names[key])!r}. Leave it to one "
                    "of them, by `include` or `exclude` of the other."
                )


def announce(kfc: KFC, trainer: Any, pl_module: Any, *, save_factors: bool, average: AveragedWeights | None) -> None:
    """Log the treatment of each layer, and warnings about optimizers.

    Args:
        kfc: The engine; its reviews end if the model is sharded.
        trainer: The trainer.
        pl_module: The module that is trained.
        save_factors: Whether checkpoints hold factors and inverses.
        average: The average of the weights; None for none.
    """
    _do_without_reviews(kfc, pl_module)
    _warn_of_split_layers(kfc, trainer.optimizers)
    summary = _summary(kfc, save_factors=save_factors)
    rank_zero_info("\n".join([summary, *(wrapped(average.description()) if average is not None else [])]))
    _advise(kfc, trainer, pl_module)


@rank_zero_only
def show_information() -> None:
    """Show the engine's information as Lightning shows its own; keep a level that the user has set."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(logging.StreamHandler())
        LOGGER.propagate = False


def _do_without_reviews(kfc: KFC, pl_module: Any) -> None:
    if not any(map(is_sharded, pl_module.parameters())):
        return
    message = kfc.reviewer.end("the parameters of the model are sharded over ranks", fixed=True)
    if message:
        rank_zero_info(message)


def _warn_of_split_layers(kfc: KFC, optimizers: Sequence[Any]) -> None:
    owned = [kfc.layers.learning_rates(optimizer) for optimizer in optimizers]
    known = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    split = []
    for name, layer in kfc.layers.items():
        own = {id(p) for p in layer.adapter.own_parameters().values()}
        if own and not any(name in rates for rates in owned) and any(own & ids for ids in known):
            split.append(name)
    if split:
        rank_zero_warn(
            f"KFCCallback does not precondition {listed(split)}: no optimizer has all parameters of the layer. "
            "Give its weight and its bias to the same optimizer, or add it to `exclude` to silence this."
        )


def _summary(kfc: KFC, *, save_factors: bool) -> str:
    coverage, choice = kfc.coverage(), kfc.rule_choice
    lines = [f"KFC preconditions these layers:\n{coverage}"]
    if choice.reason:
        lines += wrapped(f"rule='auto' chooses {choice.rule!r}: {choice.reason}.")
    if save_factors:
        size = f"{coverage.bytes / 1e6:.3f} MB"
        lines += wrapped(f"Each checkpoint holds {size} of factors and inverses (save_factors=False: none).")
    else:
        lines += wrapped("Checkpoints hold no factors (save_factors=False): a resumed run repeats the warm-up.")
    return "\n".join(lines)


def _advise(kfc: KFC, trainer: Any, pl_module: Any) -> None:
    found: dict[OptimizerWarning, None] = {}
    # A resumed run may plan fewer steps than were made.
    steps = max(0.0, _planned_steps(trainer) - trainer.global_step)
    resumed = kfc.step > 0 or trainer.global_step > 0
    for optimizer in trainer.optimizers:
        covered = {id(p) for name in kfc.layers.learning_rates(optimizer) for p in kfc.layers[name].parameters()}
        groups = [group for group in optimizer.param_groups if covered & set(map(id, group["params"]))]
        schedules = schedules_of(trainer, pl_module, optimizer)
        own = warnings_for(optimizer, kfc.settings, groups=groups, schedules=schedules, steps=steps, resumed=resumed)
        found |= dict.fromkeys(own)
    if kfc.step == 0 and (short := warning_for_run(kfc.settings, steps)) is not None:
        found[short] = None
    for each in found:
        log = rank_zero_warn if each.severe else rank_zero_info
        log(f"KFCCallback: {each.text}")


def _planned_steps(trainer: Any) -> float:
    """The number of optimizer steps of a fit; infinity if Lightning cannot predict it."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # the number of accumulated batches changes with the epoch
        return math.inf
    return float(steps) if steps > 0 else math.inf
