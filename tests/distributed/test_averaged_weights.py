"""Averaged weights are equal on all ranks; sharded weights are not averaged, with a message."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_kfc import KFCCallback
from tests.distributed.nets import EXACT, Net, difference, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.distributed.sharded_nets import Sharded
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


class Seen(Net):
    """Notes batches as batch norm reads them, weights after steps, and what validation is given."""

    def __init__(self) -> None:
        super().__init__(norm_net)
        self.batches: list[Tensor] = []
        self.steps: list[dict[str, Tensor]] = []
        self.validated: dict[str, Tensor] = {}
        self.net[1].register_forward_pre_hook(self.keep)

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            self.batches.append(inputs[0].detach().transpose(0, 1).flatten(1))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated = {name: value.clone() for name, value in self.state_dict().items()}


def averaged(values: list[Tensor], decay: float = 0.9) -> Tensor:
    result = values[0]
    for k, value in enumerate(values, 1):
        share = min((k - 1) / (k + 9), decay)
        result = share * result + (1 - share) * value
    return result


def validated() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The validated weights of a rank, and the weights that its own record requires."""
    module = Seen()
    used = trainer(
        KFCCallback(**{**EXACT, "kl_clip": 0.03}),
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        num_sanity_val_steps=0,
    )
    used.fit(module, loader(images(64), 4), loader(images(8), 4))
    # The weights of the last step, and the batch of the initial ones, do not count.
    expected = {name: averaged([step[name] for step in module.steps[:-1]]) for name in module.steps[0]}
    expected["net.1.running_mean"] = averaged([x.mean(1) for x in module.batches[1:]])
    expected["net.1.running_var"] = averaged([x.std(1) for x in module.batches[1:]]) ** 2
    return {name: module.validated[name] for name in expected}, expected


def test_ranks_validate_one_average_with_the_statistics_of_the_first(two_ranks: Ranks) -> None:
    (first, expected), (second, _) = two_ranks.run(validated)
    assert difference(first, second) == 0
    assert difference(first, expected) < 1e-9


def sharded(folder: Path) -> tuple[str, bool]:
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    callback = KFCCallback(**{**EXACT, "kl_clip": 0.03})
    packages = ("lightning.pytorch", "pytorch_lightning")
    loggers = [logging.getLogger(f"{package}.utilities.rank_zero") for package in packages]
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    for logger in loggers:
        logger.addHandler(handler)
    used = trainer(callback, strategy=strategy, devices=2)
    used.fit(Sharded(), loader(images(24), 4))
    used.save_checkpoint(folder / "sharded.ckpt")
    for logger in loggers:
        logger.removeHandler(handler)
    return text.getvalue(), "averaged_weights" in callback.state_dict()


def test_sharded_weights_are_not_averaged_and_one_line_reports_it(two_ranks: Ranks, tmp_path: Path) -> None:
    (text, saved), _ = two_ranks.run(sharded, tmp_path)
    assert text.count("KFCCallback does not average the weights: they are sharded over ranks.") == 1
    assert not saved
    assert "state_dict" in torch.load(tmp_path / "sharded.ckpt", weights_only=True)
