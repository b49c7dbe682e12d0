"""Pictures reach loggers and files, and the report matches the training, which does not change."""

from __future__ import annotations

import base64
import contextlib
import html
import importlib.util
import inspect
import io
import os
import pickle
import re
import socket
import warnings
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFCCallback, Logging
from lightning_kfc.pictures.snapshots import SpectraOverTime
from lightning_kfc.reporting.map_watcher import MapWatcher
from lightning_kfc.reporting.report import Report
from lightning_kfc.settings import CALLBACK_DEFAULTS, Settings
from tests.helpers.harness import QUIET, Classifier, Watch, dense_net, fit, hooks_of, images, loader, weights

pytestmark = [*(pytest.mark.filterwarnings(entry) for entry in QUIET), pytest.mark.slow]

PICTURES = ("step_time", "coverage", "spectra", "autocorrelation", "factors")
SECTIONS = [
    "Run",
    "Numbers over time",
    "Events",
    "Advice",
    "Coverage",
    "Time of a step",
    "Spectra of the factors",
    "Autocorrelation over space",
    "Factors",
    "Settings",
]


class Logged(Classifier):
    """Logs its loss under a name of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def train(callback: KFCCallback, module: Classifier | None = None, *, steps: int = 24, **options: Any) -> Classifier:
    torch.manual_seed(1)
    module = Classifier() if module is None else module
    fit(module, kfc=callback, data=loader(images(200)), max_steps=steps, **{"log_every_n_steps": 1, **options})
    return module


@contextlib.contextmanager
def watchers(callback: KFCCallback) -> Iterator[list[tuple[int, MapWatcher]]]:
    """The attached watchers, each with the step."""
    found: list[tuple[int, MapWatcher]] = []
    attach = MapWatcher.attach

    def noted(self: MapWatcher) -> None:
        found.append((callback.kfc.step, self))
        attach(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MapWatcher, "attach", noted)
        yield found


class Page(HTMLParser):
    """The structure of an HTML document, and what it refers to."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.open[-1] if self.open else ""] = self.text.get(self.open[-1] if self.open else "", "") + data


def drawings(page: Page) -> list[str]:
    prefix = "data:image/svg+xml;base64,"
    assert all(reference.startswith(prefix) for reference in page.references), page.references
    return [base64.b64decode(reference.removeprefix(prefix)).decode() for reference in page.references]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with all there is."""
    folder = tmp_path_factory.mktemp("run")
    callback = KFCCallback(damping=0.02, logging=Logging(pictures_every_n_steps=5, report_dir=str(folder / "report")))
    train(callback, Logged(), logger=TensorBoardLogger(folder / "tb"))
    return SimpleNamespace(folder=folder, callback=callback, html=(folder / "report/report.html").read_text("utf-8"))


def test_tensorboard_gets_each_picture_at_the_first_step_with_statistics_of_each_period(run: Any) -> None:
    (events,) = (run.folder / "tb").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert sorted(log.Tags()["images"]) == sorted(f"kfc/{name}" for name in PICTURES)
    for name in PICTURES:
        taken = log.Images(f"kfc/{name}")
        # Warm-up ends at step 10; then statistics are taken at every tenth step.
        assert [event.step for event in taken] == ([0] if name == "coverage" else [0, 5, 10, 20])
        for event in taken:
            colours = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB").getcolors(1 << 20)
            assert colours is not None
            assert len(colours) > 20, f"{name} at {event.step} is empty"


def test_files_get_the_pictures_of_the_same_steps(run: Any) -> None:
    found = sorted(path.name for path in (run.folder / "report/pictures").iterdir())
    steps = {name: (0,) if name == "coverage" else (0, 5, 10, 20) for name in (*PICTURES, "numbers")}
    assert found == sorted(f"{name}-{step:07d}.png" for name, at in steps.items() for step in at)


def test_the_report_parses_and_refers_to_nothing_outside_itself(run: Any) -> None:
    page = Page(run.html)
    assert re.findall(r"<h2>(.*?)</h2>", run.html) == SECTIONS
    drawn = drawings(page)
    assert len(drawn) == 5
    for text in drawn:
        inner = [v for e in ElementTree.fromstring(text).iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(v.startswith(("#", "data:image/png;base64,")) for v in inner)
        assert re.findall(r"url\((?!#)", text) == []
    everything = run.html + "".join(drawn)
    # Names of name spaces are no addresses that anything is fetched from.
    assert set(re.findall(r"https?://[^\"' )<]+", everything)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in everything
    assert "<script" not in everything


def test_the_report_has_what_was_run(run: Any) -> None:
    page = Page(run.html)
    assert page.text["h1"] == "KFC: training of Logged"
    assert page.text["pre"] == str(run.callback.kfc.coverage())
    facts = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", run.html))
    assert facts["Optimizer steps"] == "24"
    assert facts["Ended"] == "as planned"
    assert facts["Optimizer at the end"] == "SGD(lr=0.1, momentum=0.5)"
    assert facts["damping"] == "0.02  (set)"
    assert html.unescape(facts["kl_clip"]) == "'auto'"
    assert "All went as planned." in page.text["p"]


def test_numbers_over_time_are_those_that_were_logged(run: Any) -> None:
    series = run.callback.report_history.series()
    assert {"train/loss", "kfc/damping", "kfc/kl_clip_factor", "kfc/kl"} <= set(series)
    (log,) = (run.folder / "tb").rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
    for key in ("train/loss", "kfc/cosine"):
        logged = [(event.step, event.value) for event in scalars.Scalars(key)]
        assert [step for step, _ in series[key]] == [step for step, _ in logged]
        assert [value for _, value in series[key]] == pytest.approx([value for _, value in logged], rel=1e-6)
    numbers = drawings(Page(run.html))[0]
    flat = {key for key, points in series.items() if len({value for _, value in points}) == 1}
    assert all((f">{key}<" in numbers) == (key not in flat) for key in series)


def test_the_time_of_a_step_is_that_of_its_parts(run: Any) -> None:
    times = run.callback.kfc.times
    assert times.steps == 24
    assert all(seconds > 0 for seconds in times.mean_step().values())
    assert "statistics: " in drawings(Page(run.html))[1]


def test_spectra_are_of_the_first_and_the_last_step(run: Any) -> None:
    drawn = drawings(Page(run.html))[2]
    assert ">step 0<" in drawn
    assert ">step 23<" in drawn


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_a_training_with_pictures_is_the_training_without(inverse: Any, tmp_path: Path) -> None:
    plain = train(KFCCallback(inverse=inverse), steps=12)
    torch.manual_seed(1)
    # Maps are watched, and spectra taken, at steps 0, 1, 2, 4 and 8.
    shown = KFCCallback(inverse=inverse, logging=Logging(report_dir=str(tmp_path)))
    with watchers(shown) as found:
        assert torch.equal(weights(train(shown, steps=12)), weights(plain))
    assert [step for step, _ in found] == [0, 1, 2, 4, 8]


def test_nothing_is_watched_between_the_steps_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = MapWatcher.__init__
    # Fixed, so that no review causes further statistics.
    callback = KFCCallback(logging=Logging(pictures_every_n_steps=8), damping=0.01, kl_clip=0.03)

    def noted(self: MapWatcher, *args: Any, **kwargs: Any) -> None:
        made.append(callback.kfc.step)
        original(self, *args, **kwargs)

    monkeypatch.setattr(MapWatcher, "__init__", noted)
    module = Classifier()
    attached: dict[int, list[str]] = {}
    watched = KFCCallback.on_train_batch_start

    def note(self: Any, *args: Any) -> None:
        attached[callback.kfc.step] = hooks_of(module)
        watched(self, *args)

    monkeypatch.setattr(KFCCallback, "on_train_batch_start", note)
    train(callback, module, steps=24)
    # Every eighth step; statistics are taken at all of the first ten, then at every tenth.
    assert made == [0, 8, 20]
    assert set(map(tuple, attached.values())) == {()}
    assert hooks_of(module) == []


def test_without_the_options_nothing_is_measured_or_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nobody asked for this")

    monkeypatch.setattr(MapWatcher, "__init__", refused)
    monkeypatch.setattr(Report, "figures", refused)
    monkeypatch.chdir(tmp_path)
    callback = KFCCallback()
    train(callback, steps=3, log_every_n_steps=0)
    assert callback.kfc.times.mean_step() == {}
    assert callback.report_history.series() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_report_alone_takes_pictures_at_steps_ever_further_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a fixed bound, no review causes a further refresh.
    callback = KFCCallback(kl_clip=0.03, logging=Logging(report_dir=str(tmp_path)))
    taken: list[int] = []
    take = SpectraOverTime.take

    def noted(self: SpectraOverTime, step: int, layers: Any) -> None:
        taken.append(step)
        take(self, step, layers)

    monkeypatch.setattr(SpectraOverTime, "take", noted)
    train(callback, steps=24, logger=CSVLogger(tmp_path / "csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csv", "report.html"]
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert taken == [0, 1, 2, 4, 8, 20, 23]
    # The module logs nothing itself: its loss is what training_step returned.
    assert ">loss<" in drawings(page)[0]


def test_pictures_alone_write_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(KFCCallback(logging=Logging(pictures_every_n_steps=2)), steps=4)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fails_leaves_a_report_that_reports_it(tmp_path: Path) -> None:
    def fail(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise RuntimeError("the <disk> is full")

    with pytest.raises(RuntimeError, match="disk"):
        train(KFCCallback(logging=Logging(report_dir=str(tmp_path))), callbacks=[Watch("on_train_batch_end", fail)])
    text = (tmp_path / "report.html").read_text("utf-8")
    Page(text)
    assert "RuntimeError: the &lt;disk&gt; is full" in text


def test_a_training_that_fails_at_once_leaves_a_report_with_nothing_in_it(tmp_path: Path) -> None:
    def fail(trainer: Any, module: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        train(KFCCallback(logging=Logging(report_dir=str(tmp_path))), callbacks=[Watch("on_train_start", fail)])
    assert "No numbers were logged" in (tmp_path / "report.html").read_text("utf-8")


def test_events_are_in_the_report(tmp_path: Path) -> None:
    module = Classifier(loss=lambda z, y: F.cross_entropy(z, y) * (float("nan") if len(module.losses) == 2 else 1))
    with pytest.warns(UserWarning, match="not finite"):
        train(KFCCallback(logging=Logging(report_dir=str(tmp_path))), module, steps=6)
    assert "<th>nonfinite gradients</th><td>1</td>" in (tmp_path / "report.html").read_text("utf-8")


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    callback = KFCCallback(logging=Logging(pictures_every_n_steps=3, report_dir=str(tmp_path)))
    with watchers(callback) as found:
        train(callback, steps=5, accumulate_grad_batches=3)
    drawn = sorted((tmp_path / "pictures").glob("factors-*"))
    assert [path.name for path in drawn] == [f"factors-{step:07d}.png" for step in (0, 3)]
    # Eight examples: those of the first of three batches.
    assert {entry.examples for _, watcher in found for entry in watcher.statistics()} == {8}


def test_a_net_without_convolutions_has_all_but_the_autocorrelation(tmp_path: Path) -> None:
    callback = KFCCallback(logging=Logging(pictures_every_n_steps=4, report_dir=str(tmp_path)))
    train(callback, Classifier(dense_net(batch_norm=True)), steps=4)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "No convolution over two dimensions" in text
    assert len(drawings(Page(text))) == 4


def test_only_the_writing_rank_does_anything(tmp_path: Path) -> None:
    options = Logging(pictures_every_n_steps=1, report_dir=str(tmp_path))
    trainer = SimpleNamespace(is_global_zero=False)
    without_attributes: Any = object()
    reporting = Report(options, without_attributes, trainer, nn.Linear(1, 1))
    reporting.step_begins()
    reporting.numbers(0, {"a": 1.0})
    reporting.step_ends(0, {})
    assert reporting.write() is None
    reporting.measured.epoch_ends(0)
    assert reporting.measured.history.series() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(UserWarning, match=r"could not write '.*taken.report.html'"):
        module = train(KFCCallback(logging=Logging(report_dir=str(tmp_path / "taken"))), steps=2)
    assert len(module.losses) == 2


def test_a_second_fit_has_a_report_of_its_own(tmp_path: Path) -> None:
    # A path does as well as a string.
    callback, module = KFCCallback(logging=Logging(report_dir=tmp_path)), Classifier()  # type: ignore[arg-type]
    train(callback, module, steps=3)
    train(callback, module, steps=5)
    assert "<th>Optimizer steps</th><td>8</td>" in (tmp_path / "report.html").read_text("utf-8")
    assert callback.report_history.series()["kfc/damping"][0][0] == 0


def test_two_callbacks_in_one_folder_are_refused(tmp_path: Path) -> None:
    both = [KFCCallback(include=name, logging=Logging(report_dir=str(tmp_path))) for name in ("net.0", "net.3")]
    with pytest.raises(ValueError, match=r"two KFCCallbacks have logging\.report_dir"):
        train(both[0], callbacks=both[1:])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pictures_every_n_steps": 0}, ValueError, "logging.pictures_every_n_steps must be at least 1, got 0"),
        (
            {"pictures_every_n_steps": 2.5},
            TypeError,
            "logging.pictures_every_n_steps must be a whole number, got 2.5",
        ),
        ({"report_dir": 3}, TypeError, "logging.report_dir must be the path of a folder, got 3 of type int"),
        ({"report_dir": ""}, TypeError, "logging.report_dir must be the path of a folder, got ''"),
    ],
)
def test_wrong_options_are_errors_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Logging(**options)


@pytest.mark.parametrize("options", [{"pictures_every_n_steps": 5}, {"report_dir": "here"}])
def test_without_matplotlib_the_options_are_errors_that_name_the_extra(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        Logging(**options)


def test_a_copied_callback_keeps_the_options() -> None:
    twin = pickle.loads(pickle.dumps(KFCCallback(logging=Logging(pictures_every_n_steps=7, report_dir="here"))))
    assert twin.logging == Logging(pictures_every_n_steps=7, report_dir="here")


def _train_on_two_ranks(rank: int, port: int, folder: str) -> None:
    """One rank of a distributed training: with pictures, then without."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ.update(environment, WORLD_SIZE="2")
    warnings.filterwarnings("ignore")
    shown = KFCCallback(logging=Logging(pictures_every_n_steps=4, report_dir=f"{folder}/report"))
    found = {}
    with watchers(shown) as attached:
        for name, callback in (("shown", shown), ("plain", KFCCallback())):
            module = train(callback, steps=6, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
            found[name] = weights(module)
    found["watched"] = torch.tensor(bool(attached))
    torch.save(found, f"{folder}/{rank}.pt")


def test_of_two_ranks_one_writes_and_both_train_as_without(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_on_two_ranks, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["shown"], first["plain"])
    assert torch.equal(first["shown"], second["shown"])
    assert bool(first["watched"])
    assert not bool(second["watched"])
    text = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "<th>Ranks</th><td>2</td>" in text
    assert len(drawings(Page(text))) == 5
    assert len([*(tmp_path / "report" / "pictures").iterdir()]) == 6 + 5


def test_what_the_report_takes_for_the_callback_s_defaults_are_its_defaults() -> None:
    shown = inspect.signature(KFCCallback.__init__).parameters
    for entry in fields(Settings):
        if entry.init and entry.name in shown:
            assert shown[entry.name].default == CALLBACK_DEFAULTS.get(entry.name, entry.default), entry.name
