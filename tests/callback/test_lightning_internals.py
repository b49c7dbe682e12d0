"""The private names of Lightning exist, with the assumed meaning."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import batch_size_scaling, lr_finder

from lightning_kfc.callback import lightning_internals
from lightning_kfc.callback.lightning_internals import (
    FINDERS_CHECKPOINTS,
    accumulates,
    data_parallel_group,
    logged_step,
    resumed_from,
)
from tests.helpers.lightning_nets import QUIET, Regression, loader, trainer, vectors

pytestmark = QUIET
FILE = Path(lightning_internals.__file__)


def private_names(path: Path) -> set[str]:
    """The private attributes of other objects that a file reads or writes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            found.update(each.value for each in node.args[1:2] if isinstance(each, ast.Constant))
    return {name for name in found if re.match(r"_(?!_)", name)}


def required(present: bool, name: str) -> None:
    assert present, f"Lightning {lightning.__version__} has no {name}: mend {FILE.name}"


def test_lightning_has_every_private_name_that_is_relied_on() -> None:
    fitted = trainer(max_steps=1, max_epochs=-1)
    for path in ("fit_loop._should_accumulate", "fit_loop.epoch_loop._batches_that_stepped"):
        owner: Any = fitted
        for name in path.split("."):
            required(hasattr(owner, name), f"Trainer.{path}")
            owner = getattr(owner, name)
    strategy = ModelParallelStrategy()
    required("_device_mesh" in vars(strategy), "ModelParallelStrategy._device_mesh")
    used = private_names(FILE)
    assert used == {"_should_accumulate", "_batches_that_stepped", "_device_mesh"}


@pytest.mark.parametrize(("module", "start"), [(lr_finder, ".lr_find_"), (batch_size_scaling, ".scale_batch_size_")])
def test_the_finders_name_their_checkpoints_as_is_relied_on(module: Any, start: str) -> None:
    assert start in FINDERS_CHECKPOINTS
    required(f'"{start}' in Path(module.__file__).read_text("utf-8"), f"checkpoint that begins with {start!r}")


def test_they_mean_what_they_are_taken_for() -> None:
    seen: list[tuple[bool, int]] = []

    class Looking(Regression):  # type: ignore[misc]  # its base is untyped
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((accumulates(self.trainer), logged_step(self.trainer)))

    fitted = trainer(accumulate_grad_batches=2, max_epochs=1)
    fitted.fit(Looking(), loader(vectors(12), batch_size=3))
    assert seen == [(True, 0), (False, 0), (True, 1), (False, 1)]
    assert data_parallel_group(fitted.strategy) is None
    assert resumed_from(fitted) is None
