"""The paper's experiments read the official formats, and train, search and report as they state."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import nn

from benchmarks.contest.data import Split
from benchmarks.paper import __main__ as experiments
from benchmarks.paper import archives, training
from benchmarks.paper.networks import NETWORKS, ResponseNorm
from benchmarks.paper.record import EXTENSIONS, SEARCH_SEED, Record, next_run, reach
from benchmarks.paper.training import Contestant, Run
from tests.helpers.harness import QUIET

pytestmark = [pytest.mark.filterwarnings(entry) for entry in QUIET]


class Python2Pickler(pickle._Pickler):
    """Writes bytes, and text within ASCII, as Python 2 wrote its strings: the official files are of that kind."""

    def save_string(self, text: bytes | str) -> None:
        content = text if isinstance(text, bytes) else text.encode("ascii")
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    def save_name(self, thing: Any, name: str | None = None) -> None:
        name = name or thing.__name__
        module = {"_reconstruct": "numpy.core.multiarray"}.get(name, thing.__module__)
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii"))
        self.memoize(thing)

    dispatch: ClassVar = {
        **pickle._Pickler.dispatch,
        **dict.fromkeys((bytes, str), save_string),
        **dict.fromkeys((type, type(len), type(lambda: None)), save_name),
    }


def python2_pickle(thing: Any) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(thing)
    return stream.getvalue()


def small_cifar(per_file: int = 12) -> dict[str, dict[bytes, Any]]:
    """The content of the official files, by file, with fewer images of two distinct kinds."""
    random = np.random.default_rng(0)
    found: dict[str, dict[bytes, Any]] = {}
    for name in archives.CIFAR_FILES:
        labels = [int(label) for label in random.integers(0, 10, per_file)]
        pixels = random.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        pixels[np.array(labels) < 5, :1024] //= 8
        found[name] = {
            b"batch_label": b"small",
            b"labels": labels,
            b"data": pixels,
            b"filenames": [b"x.png"] * per_file,
        }
    return found


def write_cifar(folder: Path, batches: dict[str, dict[bytes, Any]]) -> Path:
    unpacked = folder / archives.CIFAR_FOLDER
    unpacked.mkdir()
    for name, batch in batches.items():
        (unpacked / name).write_bytes(python2_pickle(batch))
    return unpacked


def test_the_small_files_are_of_python_2() -> None:
    content = python2_pickle(small_cifar(2)["test_batch"])
    assert content.startswith(b"\x80\x02")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    assert b"_codecs" not in content
    # Without an encoding its strings would be text, as with the official files.
    assert set(pickle.loads(content, encoding="latin1")) == {"batch_label", "labels", "data", "filenames"}


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_is_read_as_it_was_written(tmp_path: Path, packed: bool) -> None:
    batches = small_cifar()
    unpacked = write_cifar(tmp_path, batches)
    if packed:
        with tarfile.open(tmp_path / archives.CIFAR_ARCHIVE, "w:gz") as tar:
            tar.add(unpacked, archives.CIFAR_FOLDER)
        for file in unpacked.iterdir():
            file.unlink()
        unpacked.rmdir()
    data = archives.cifar10(tmp_path)
    ordered = [batches[name] for name in archives.CIFAR_FILES]
    pixels = [torch.from_numpy(batch[b"data"]).reshape(-1, 3, 32, 32) for batch in ordered]
    assert torch.equal(data.train_inputs, torch.cat(pixels[:5]))
    assert torch.equal(data.test_inputs, pixels[5])
    assert data.train_targets.tolist() == [label for batch in ordered[:5] for label in batch[b"labels"]]
    assert data.test_targets.tolist() == ordered[5][b"labels"]
    # Red of the whole image first, row by row.
    assert data.train_inputs[3, 0, 2, 5] == batches["data_batch_1"][b"data"][3, 2 * 32 + 5]


def test_svhn_is_read_as_it_was_written_and_label_ten_is_digit_zero(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    written = {}
    for name, count in zip(archives.SVHN_FILES, (11, 7), strict=True):
        pixels = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count, dtype=np.uint8) % 10 + 1).reshape(-1, 1)
        written[name] = pixels, labels
        savemat(tmp_path / name, {"X": pixels, "y": labels})
    data = archives.svhn(tmp_path)
    pixels, _ = written["train_32x32.mat"]
    assert data.train_inputs.shape == (11, 3, 32, 32)
    assert all(np.array_equal(data.train_inputs[i].permute(1, 2, 0).numpy(), pixels[..., i]) for i in range(11))
    assert data.train_targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.test_targets.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_missing_is_named_with_its_official_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither cifar-10-python.tar.gz nor cifar-10-batches-py/.*kriz/cifar"):
        archives.cifar10(tmp_path)
    (write_cifar(tmp_path, small_cifar(2)) / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_4: .*kriz/cifar"):
        archives.cifar10(tmp_path)
    savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((2, 2))})
    with pytest.raises(FileNotFoundError, match=r"lacks test_32x32.mat: http://ufldl.stanford.edu/housenumbers/"):
        archives.svhn(tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"train_32x32.mat is no file of SVHN's cropped digits: it lacks X"):
        archives.svhn(tmp_path)


class Runs:
    """A function that an unrestricted unpickler would call."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, ("1 / 0",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(Runs()), r"it names builtins\.eval"),
        (b"no pickle", "no file of CIFAR-10"),
        (python2_pickle({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}), "lacks data of bytes"),
        (python2_pickle({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "lacks data of bytes"),
        (python2_pickle([1]), "lacks data of bytes"),
    ],
)
def test_a_file_of_another_kind_is_an_error_and_nothing_of_it_runs(tmp_path: Path, content: bytes, said: str) -> None:
    (write_cifar(tmp_path, small_cifar(2)) / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_1 is no file .*{said}|data_batch_1 is {said}"):
        archives.cifar10(tmp_path)


# Networks.


def layer_shapes(name: str) -> list[tuple[int, ...]]:
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    net = NETWORKS[name](images).eval()
    assert net(images[:2]).shape == (2, 10)
    centred = net[0](images)
    assert torch.allclose(centred.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    if name == "svhn":
        assert torch.allclose(centred.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3)
    return [tuple(layer.weight.shape) for layer in net if isinstance(layer, nn.Conv2d | nn.Linear)]


def test_the_networks_have_the_layers_of_their_sources() -> None:
    assert layer_shapes("cifar10") == [(32, 3, 5, 5), (32, 32, 5, 5), (64, 32, 5, 5), (10, 1024)]
    convolutions = [(96, 3, 5, 5), (128, 96, 5, 5), (256, 128, 5, 5)]
    assert layer_shapes("svhn") == [*convolutions, (2048, 4096), (2048, 2048), (10, 2048)]


def test_response_norm_divides_by_the_squares_around_each_location() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = torch.empty_like(x)
    for row in range(5):
        for column in range(4):
            window = x[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            squares = window.square().sum((2, 3))
            expected[:, :, row, column] = x[:, :, row, column] / (1 + 5e-5 / 9 * squares) ** 0.75
    assert torch.allclose(ResponseNorm()(x), expected, rtol=1e-12)


# The search, and what is reported.


def finished(name: str, lr: float, seed: int, error: float) -> Run:
    return Run(name, lr, seed, 5, [2, 4], [1.0, 2.0], [0.9, error], [0.9, error])


def test_a_search_grows_at_its_edge_and_then_each_seed_is_trained_with_the_best_rate() -> None:
    errors = {0.01: 0.5, 0.1: 0.4, 1.0: 0.3, 10.0: 0.2, 100.0: 0.6}
    contestant = Contestant("made up", 8, 0.9, (0.01, 0.1, 1.0), list)
    record, order = Record("cifar10", 60, 12), []
    while run := next_run(record, "it", contestant, (0, 1), 20, 5):
        order.append((run.lr, run.seed, run.epochs))
        record.runs.append(finished("it", run.lr, run.seed, errors[run.lr]))
    searched = [(lr, SEARCH_SEED, 5) for lr in errors]
    assert order == [*searched, (10.0, 0, 20), (10.0, 1, 20)]


def test_a_search_whose_best_rate_stays_at_the_edge_ends() -> None:
    contestant = Contestant("made up", 8, 0.9, (0.01, 0.1), list)
    record = Record("cifar10", 60, 12)
    while run := next_run(record, "it", contestant, (0,), 20, 5):
        record.runs.append(finished("it", run.lr, run.seed, 1 / (1 + run.lr)))
    assert len(record.of("it", search=True)) == 2 + EXTENSIONS


def test_a_threshold_is_reached_at_the_first_measurement_that_is_no_higher() -> None:
    run = Run("it", 0.1, 0, 1, [5, 10, 15], [1.0, 2.0, 3.0], [0.5, 0.2, 0.3], [0.5, 0.4, 0.4])
    assert reach(run, 0.2) == (10, 2.0)
    assert reach(run, 0.1) == (math.inf, math.inf)


class Fixed(nn.Module):
    """Calls every image a zero, with one weight that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(10)[0].repeat(len(x), 1) + self.weight


def test_errors_are_the_shares_of_wrong_labels_over_whole_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MEASURED", 8)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 3)
    images = torch.zeros(11, 3, 32, 32, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0])
    run = Run("it", 0.1, 0, 4)
    contestant = Contestant("made up", 5, 0.9, (0.1,), list)
    data = Split(images, labels, images[:7], labels[:7])
    training.train(data, lambda _: Fixed(), contestant, run, evaluations=4, accelerator="cpu")
    # Two whole batches an epoch; the error of the first eight examples.
    assert run.iterations == [2, 4, 6, 8]
    assert run.training_errors == [0.625] * 4
    assert run.test_errors == [round(4 / 7, 5)] * 4
    assert run.seconds == sorted(run.seconds)


def test_a_data_set_smaller_than_a_batch_is_an_error() -> None:
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="needs a batch of 512, and there are 4 examples"):
        training.train(
            Split(images, labels, images, labels),
            NETWORKS["cifar10"],
            training.CONTESTANTS["kfc"],
            Run("kfc", 0.5, 0, 1),
            evaluations=1,
            accelerator="cpu",
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:KFCCallback. a momentum of 0.9")
def test_the_command_trains_each_contestant_on_small_files_and_goes_on_where_it_left_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path, small_cifar())
    small = {name: replace(contestant, batch_size=20) for name, contestant in training.CONTESTANTS.items()}
    monkeypatch.setattr(experiments, "CONTESTANTS", small)
    command = ["--data", str(tmp_path), "--net", "cifar10", "--results", str(tmp_path), "--device", "cpu"]
    command += ["--seeds", "0", "--epochs", "2", "--search-epochs", "1", "--evaluations", "2"]
    assert experiments.main([*command, "--pieces", "1"]) == 3
    assert experiments.main(command) == 0
    record = Record.load(tmp_path / "paper_cifar10.json")
    assert {run.contestant for run in record.runs if run.seed == 0} == set(small)
    assert all(run.iterations == [3, 6] for run in record.runs if run.seed == 0)
    assert all(0 <= error <= 1 for run in record.runs for error in (*run.training_errors, *run.test_errors))
    table = (tmp_path / "paper_cifar10.md").read_text()
    assert all(f"| {contestant.title}, batch 20 |" in table for contestant in small.values())
    assert table.strip() in capsys.readouterr().out
    assert json.loads((tmp_path / "paper_cifar10.json").read_text())["measured_on"]["device"] == "cpu"
    with pytest.raises(SystemExit):
        experiments.main([*command, "--epochs", "3"])
    assert "trainings of other lengths" in capsys.readouterr().err


def test_a_missing_archive_ends_the_command_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main(["--data", str(tmp_path), "--net", "svhn"])
    assert "lacks train_32x32.mat, test_32x32.mat: http://ufldl.stanford.edu/housenumbers/" in capsys.readouterr().err


@pytest.mark.slow
def test_kfc_at_its_defaults_learns_images_that_differ_in_their_red_half() -> None:
    images = torch.randint(0, 100, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 2
    images[labels == 1, 0, :16] += 100
    run = Run("kfc", 0.5, 0, 4)
    contestant = replace(training.CONTESTANTS["kfc"], batch_size=32)
    data = Split(images, labels, images[:32], labels[:32])
    training.train(data, NETWORKS["cifar10"], contestant, run, evaluations=2, accelerator="cpu")
    assert run.training_errors[-1] == run.test_errors[-1] == 0
