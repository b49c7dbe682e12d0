"""The numbers of a report: each one once, at the step where it was measured; losses first, no flat chart."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_kfc import KFCCallback, Logging
from lightning_kfc.pictures.draw import UNITS
from lightning_kfc.pictures.html import render
from lightning_kfc.reporting.measured import is_flat
from lightning_kfc.reporting.report import Report
from tests.helpers.harness import QUIET, Classifier, images, loader, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Validated(Classifier):
    """Logs numbers of every kind, and keeps what is to be found of them in a report."""

    def __init__(self) -> None:
        super().__init__()
        #: The steps after which validations came, with the mean of what they measured.
        self.validations: list[tuple[int, float]] = []
        self._values: list[float] = []
        self._epoch: list[float] = []
        #: The last steps of epochs, with their mean loss.
        self.epochs: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        self._epoch.append(float(loss.detach()))
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs.append((self.trainer.global_step - 1, sum(self._epoch) / len(self._epoch)))
        self._epoch.clear()
        self.log("at_epoch_end", float(self.current_epoch))
        self.log("always", 2.5)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        # The second and the third validation measure the same.
        same = len(self.validations) in (1, 2)
        value = torch.tensor(2.5) if same else self.loss(self(x), y).detach()
        self.log("val_loss", value)
        self._values.append(float(value))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append((self.trainer.global_step - 1, sum(self._values) / len(self._values)))
        self._values.clear()


def approximately(points: list[tuple[int, float]]) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


def run(folder: Path, module: Classifier, **options: Any) -> KFCCallback:
    """Train for four epochs of ten steps, with two callbacks that read metrics where validation ends."""
    kfc = KFCCallback(logging=Logging(report_dir=str(folder / "report")))
    readers = [ModelCheckpoint(folder, monitor="val_loss"), EarlyStopping("val_loss", patience=100)]
    how: dict[str, Any] = {"max_steps": -1, "max_epochs": 4, "log_every_n_steps": 2, "enable_checkpointing": True}
    used = trainer([kfc, *readers], **{**how, **options})
    used.fit(module, loader(images(80)), loader(images(16), batch_size=8))
    return kfc


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report is written: to draw one takes longer than the training."""
    monkeypatch.setattr(Report, "write", lambda self, **options: None)


def drawn(page: str) -> str:
    """The first chart of a report."""
    return base64.b64decode(re.findall(r"base64,([^\"]*)\"", page)[0]).decode()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"val_check_interval": 5}, [4, 9, 14, 19, 24, 29, 34, 39]),
        ({"check_val_every_n_epoch": 2}, [19, 39]),
        ({"num_sanity_val_steps": 2}, [9, 19, 29, 39]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 7}, [6, 13, 20, 27, 34]),
    ],
)
def test_each_number_is_kept_once_at_the_step_of_its_measurement_with_the_last(
    tmp_path: Path, options: dict[str, Any], validations: list[int]
) -> None:
    module = Validated()
    series = run(tmp_path, module, **options).report_history.series()
    assert [step for step, _ in module.validations] == validations
    assert series["val_loss"] == approximately(module.validations)
    assert series["train_loss"] == approximately([(step, module.losses[step]) for step in range(0, 40, 2)])
    assert series["epoch_loss"] == approximately(module.epochs)
    assert series["at_epoch_end"] == [(9, 0.0), (19, 1.0), (29, 2.0), (39, 3.0)]


class OneName(Classifier):
    """Logs under one name in training and in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(7.0))


@pytest.mark.usefixtures("undrawn")
def test_a_name_that_validation_has_measured_is_validation_s(tmp_path: Path) -> None:
    series = run(tmp_path, OneName(), check_val_every_n_epoch=2).report_history.series()
    assert [point for point in series["val_loss"] if point[0] >= 19] == [(19, 7.0), (39, 7.0)]


@pytest.mark.slow
def test_losses_are_drawn_first_with_units_and_what_never_changes_is_a_number(tmp_path: Path) -> None:
    kfc = run(tmp_path, Validated())
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    series, chart = kfc.report_history.series(), drawn(page)
    titles = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart) if text in series]
    assert titles[:3] == ["val_loss", "train_loss", "epoch_loss"]
    assert all(title.startswith("kfc/") for title in titles[4:])
    flat = {key for key, points in series.items() if len({value for _, value in points}) == 1}
    assert {"always", "kfc/undone_steps"} <= flat
    assert set(titles) == set(series) - flat
    table = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    assert {key: table[key] for key in flat} == {key: f"{series[key][-1][1]:.4g}" for key in flat}
    assert chart.count(">optimizer step<") == len(titles)
    labels = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart)]
    units = [UNITS.get(title.removesuffix("_median"), "as logged") for title in titles]
    assert all(labels.count(unit) >= units.count(unit) for unit in units)
    assert {title.removesuffix("_median") for title in titles if title.startswith("kfc/")} <= set(UNITS)


@pytest.mark.parametrize(
    ("values", "flat"),
    [
        ([], True),
        ([1.0], True),
        ([1.0, 1.0, float("nan")], True),
        ([float("inf"), float("nan")], True),
        ([0.0, 0.0], True),
        ([0.0, 1e-12], False),
        ([1.0, 1.0 + 1e-9], True),
        ([1.0, 1.001], False),
    ],
)
def test_a_series_is_flat_where_no_two_finite_numbers_differ(values: list[float], flat: bool) -> None:
    assert is_flat(list(enumerate(values))) is flat


def test_a_report_has_colours_for_the_dark_and_no_address() -> None:
    page = render("title", [])
    assert "prefers-color-scheme: dark" in page
    # Else a long setting would widen the page beyond a phone.
    assert "td { overflow-wrap: anywhere; }" in page
    assert "http" not in page
