"""The progress bar, the table at the start, and lines while the first inverses are made."""

from __future__ import annotations

import io
import logging
import pickle
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from torch import nn

from lightning_kfc import KFC, KFCCallback, Logging
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.monitoring.messages import LOGGER
from tests.helpers.harness import QUIET, Classifier, Watch, conv_net, fit, images, loader

pytestmark = [pytest.mark.filterwarnings(entry) for entry in QUIET]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_clip_and_the_damping_of_the_step(bar: type[ProgressBar]) -> None:
    shown: list[dict[str, Any]] = []
    used = bar()

    def note(trainer: Any, module: Any, *args: Any) -> None:
        shown.append(dict(used.get_metrics(trainer, module)))

    callback = KFCCallback(damping=0.02, kl_clip=1e-3, logging=Logging(progress_bar=True))
    watch = Watch("on_train_batch_end", note)
    fit(Classifier(), kfc=callback, callbacks=[used, watch], max_steps=3, enable_progress_bar=True)
    assert len(shown) == 3
    last = callback.kfc.last_step
    assert last is not None
    assert last.kl_clip_factor < 1
    assert float(shown[-1]["kfc_damping"]) == pytest.approx(0.02)
    assert float(shown[-1]["kfc_nu"]) == pytest.approx(last.kl_clip_factor, rel=1e-2)


def test_without_the_option_the_bar_is_as_it_was() -> None:
    seen: list[str] = []
    watch = Watch("on_train_batch_end", lambda trainer, *args: seen.extend(trainer.progress_bar_metrics))
    fit(Classifier(), kfc=KFCCallback(), callbacks=[watch], max_steps=2)
    assert [name for name in seen if name.startswith("kfc")] == []


@pytest.mark.parametrize("name", ["layers", "progress_bar"])
def test_the_options_are_true_or_false_and_kept_by_copies(name: str) -> None:
    options: dict[str, Any] = {name: True}
    callback = KFCCallback(logging=Logging(**options))
    assert getattr(pickle.loads(pickle.dumps(callback)).logging, name) is True
    options = {name: 1}
    with pytest.raises(TypeError, match=rf"logging\.{name} must be true or false, got 1"):
        Logging(**options)


def nested(net: nn.Module, depth: int) -> nn.Module:
    for level in range(depth):
        holder = nn.Module()
        holder.add_module(f"a_rather_long_name_of_level_{chr(97 + level)}", net)
        holder.forward = net.forward  # type: ignore[method-assign]  # an instance's own forward
        net = holder
    return net


@pytest.mark.parametrize("depth", [0, 2, 6])
def test_the_report_at_the_start_fits_80_columns_and_a_log_file(depth: int, caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO):
            fit(Classifier(nested(net, depth)), kfc=KFCCallback(), max_steps=1)
    finally:
        logger.removeHandler(handler)
    messages = [record.getMessage() for record in caplog.records if "KFC preconditions" in record.getMessage()]
    assert len(messages) == 1
    lines = messages[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"[^\n\x20-\x7e]", messages[0]) is None, "a log file shows no escape codes and no other characters"
    table = [line.split()[0] for line in lines if re.search(r" (Conv|BatchNorm|Linear) ", line)]
    # Names still differ by their ends.
    assert len(set(table)) == 3
    assert [name.rpartition(".")[2] for name in table] == ["0", "1", "4"]


def test_reasons_with_long_names_fit_too() -> None:
    model = nested(conv_net(), 5)
    kfc = KFC(model, include="*.3")
    assert max(map(len, str(kfc.coverage()).splitlines())) <= 80


def test_a_notebook_shows_the_table_in_a_fixed_pitch() -> None:
    coverage = KFC(conv_net()).coverage()
    assert coverage._repr_html_() == f"<pre>{coverage}</pre>"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, and the seconds that each inverse takes."""
    now, refreshed = [100.0, 1.0], Layer.refreshed

    def slow(self: Layer, *args: Any) -> Any:
        now[0] += now[1]
        return refreshed(self, *args)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Layer, "refreshed", slow)
    return now


@pytest.fixture
def as_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine's logger as it is before any training."""
    level = LOGGER.level
    LOGGER.setLevel(logging.NOTSET)
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "propagate", True)
    yield
    LOGGER.setLevel(level)


def step(layers: int = 10, steps: int = 1) -> None:
    """Steps of a plain loop."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    kfc = KFC(model)
    for _ in range(steps):
        with kfc.capture():
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long))
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)


def test_first_inverses_that_are_soon_made_are_not_logged(clock: list[float], informed: list[str]) -> None:
    clock[1] = 0.199
    step()
    assert informed == []


def test_first_inverses_that_take_long_are_logged_ever_more_rarely_and_later_ones_never(
    clock: list[float], informed: list[str]
) -> None:
    step(steps=3)
    assert informed == [
        "KFC computes the first inverses: 2 of 10 layers after 2.0 s.",
        "KFC computes the first inverses: 4 of 10 layers after 4.0 s.",
        "KFC computes the first inverses: 8 of 10 layers after 8.0 s.",
        "KFC computes the first inverses: 10 of 10 layers after 10.0 s.",
    ]


def test_information_is_given_on_rank_zero_alone(
    clock: list[float], informed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    step()
    assert informed == []


LINES = [
    "KFC computes the first inverses: 1 of 2 layers after 3.0 s.",
    "KFC computes the first inverses: 2 of 2 layers after 6.0 s.",
]


@pytest.mark.usefixtures("as_imported")
@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_the_callback_shows_the_engine_s_information_unless_the_user_has_set_its_level(
    clock: list[float], caplog: pytest.LogCaptureFixture, level: int
) -> None:
    clock[1] = 3.0
    LOGGER.setLevel(level)
    fit(Classifier(), kfc=KFCCallback(), data=loader(images()), max_steps=3)
    told = [message for message in caplog.messages if "first inverses" in message]
    assert told == ([] if level else LINES)


@pytest.mark.usefixtures("as_imported")
def test_where_nobody_listens_to_logs_the_callback_s_go_to_standard_error_once(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock[1] = 3.0
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for _ in range(2):
        fit(Classifier(), kfc=KFCCallback(), data=loader(images()), max_steps=2)
    told = [line for line in capsys.readouterr().err.splitlines() if "first inverses" in line]
    assert told == 2 * LINES


@pytest.mark.usefixtures("as_imported")
def test_a_plain_loop_gets_no_warning_unless_it_requests_it(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    step()
    assert "".join(capsys.readouterr()) == ""
