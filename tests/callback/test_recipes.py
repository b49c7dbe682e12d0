"""The callback advises on the recipes that the benchmark shows to be worse, and on none of their replacements."""

from __future__ import annotations

import json
from statistics import median

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from benchmarks.accuracy.recipes import AT_START, CASES, IN_COURSE, LIMITED, Digits, Recipe, digits, table
from benchmarks.paths import RESULTS
from lightning_kfc import KFCCallback
from tests.helpers.harness import QUIET

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in QUIET),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]
MEASURED = json.loads((RESULTS / "recipes.json").read_text())
#: Clipping rescues the training; both recipes have the same momentum.
BOTH = "clip_high_rate_0.1"


class Stop(pl.Callback):
    """Ends a fit before its first step: the trainer has planned all of them."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> int:
        trainer.should_stop = True
        return -1


def advice(recipe: Recipe, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> list[str]:
    caplog.clear()
    recwarn.clear()
    with caplog.at_level("INFO"):
        trainer = pl.Trainer(
            max_epochs=recipe.epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[KFCCallback(**recipe.callback), *recipe.callbacks(), Stop()],
            **recipe.trainer,
        )
        data, _, _ = digits()
        trainer.fit(Digits(recipe), DataLoader(data, batch_size=recipe.batch_size, drop_last=True))
    warned = [str(entry.message) for entry in recwarn.list]
    return [line for line in [*caplog.messages, *warned] if line.startswith("KFCCallback:")]


@pytest.mark.slow
@pytest.mark.filterwarnings("default:KFCCallback")
@pytest.mark.parametrize("name", CASES)
def test_what_is_worse_is_advised_on_when_training_starts_and_its_replacement_is_silent(
    name: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    case = CASES[name]
    assert len(advice(case.against, caplog, recwarn)) == (name in AT_START | LIMITED)
    assert len(advice(case.instead, caplog, recwarn)) == (name == BOTH)


@pytest.mark.parametrize("name", sorted(AT_START | IN_COURSE))
def test_the_replacement_that_is_advised_was_measured_to_train_better(name: str) -> None:
    against, instead = (median(loss for loss, _ in MEASURED[name][kind]) for kind in ("against", "instead"))
    assert instead < 0.85 * against


def test_the_table_is_that_of_the_measured_recipes() -> None:
    assert (RESULTS / "recipes.md").read_text("utf-8") == table(MEASURED)


def test_the_recipes_that_are_not_advised_on_are_no_worse_by_much() -> None:
    for name in MEASURED.keys() - AT_START - IN_COURSE - {BOTH}:
        against, instead = (median(loss for loss, _ in MEASURED[name][kind]) for kind in ("against", "instead"))
        assert against < 1.15 * instead, name
