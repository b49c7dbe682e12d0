"""Numbers over time in bounded memory, where time goes, and the spectra that are kept."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_kfc.monitoring.events import History
from lightning_kfc.monitoring.timing import PHASES, REST, StepTimes
from lightning_kfc.pictures import snapshots
from lightning_kfc.pictures.snapshots import SpectraOverTime, shown, spectrum
from tests.helpers.nets import data


def test_a_history_holds_all_numbers_until_there_are_too_many_then_evenly_spread_ones_and_the_last() -> None:
    history = History(limit=8)
    for step in range(1000):
        history.add(step, {"a": float(step), **({"b": -1.0} if step == 3 else {})})
        points = history.series()["a"]
        assert len(points) <= 9 + 1
        assert points[0] == (0, 0.0)
        assert points[-1] == (step, float(step))
        if step < 8:
            assert points == [(s, float(s)) for s in range(step + 1)]
        gaps = {b - a for (a, _), (b, _) in itertools.pairwise(points[:-1])}
        assert len(gaps) <= 1, f"unevenly spread at step {step}: {points}"
    assert history.series()["b"] == [(3, -1.0)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


CPU = torch.device("cpu")


def test_a_part_inside_another_is_not_counted_to_that_one(clock: Any) -> None:
    times = StepTimes()
    for _ in range(2):
        times.begin_step(CPU)
        clock.seconds += 1
        with times.phase("preconditioning"):
            clock.seconds += 2
            with times.phase("inverses"):
                clock.seconds += 4
            clock.seconds += 8
        clock.seconds += 16
        times.end_step()
        clock.seconds += 1000
    assert times.mean_step() == {"statistics": 0, "inverses": 4, "preconditioning": 10, "reviews": 0, REST: 17}
    assert tuple(times.mean_step()) == PHASES


def test_nothing_is_counted_outside_of_steps(clock: Any) -> None:
    times = StepTimes()
    with times.phase("inverses"):
        clock.seconds += 1
    times.end_step()
    assert times.mean_step() == {}


def test_an_exception_ends_its_parts_and_a_step_that_it_left_open_is_forgotten(clock: Any) -> None:
    times = StepTimes()
    times.begin_step(CPU)

    def fail() -> None:
        with times.phase("statistics"):
            clock.seconds += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.seconds += 2
    times.begin_step(CPU)
    clock.seconds += 4
    times.end_step()
    assert times.steps == 1
    assert times.mean_step()[REST] == 4
    assert times.mean_step()["statistics"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="marks in a CUDA stream need a CUDA device")
def test_on_a_cuda_device_the_time_is_the_device_s() -> None:
    times = StepTimes()
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    (matrix @ matrix).sum().item()
    times.begin_step(device)
    with times.phase("inverses"):
        start = time.perf_counter()
        for _ in range(20):
            matrix @ matrix
        launched = time.perf_counter() - start
    times.end_step()
    start = time.perf_counter()
    torch.cuda.synchronize()
    waited = time.perf_counter() - start
    mean = times.mean_step()
    # The products ran long after they were launched.
    assert mean["inverses"] > 2 * launched
    assert mean["inverses"] == pytest.approx(launched + waited, rel=0.5)
    assert mean[REST] < mean["inverses"]


def test_a_spectrum_is_that_of_all_groups_and_of_a_diagonal_itself() -> None:
    factor = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 4.0]))])
    found = spectrum(factor)
    assert found is not None
    assert found.tolist() == [4, 3, 2, 1]
    diagonal = spectrum(torch.tensor([[1.0, 5.0]]))
    assert diagonal is not None
    assert diagonal.tolist() == [5, 1]
    rows = data(1, 6, 4)
    dense = spectrum(rows.mT @ rows)
    assert dense is not None
    assert dense.tolist() == pytest.approx(torch.linalg.svdvals(rows[0]).square().tolist())


def test_factors_that_are_too_large_or_not_finite_have_no_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spectrum(torch.full((1, 2, 2), torch.nan)) is None
    monkeypatch.setattr(snapshots, "LARGEST_FACTOR", 3)
    assert spectrum(torch.eye(4)[None]) is None
    assert spectrum(torch.eye(3)[None]) is not None
    assert spectrum(torch.ones(1, 4)) is not None


def test_few_times_are_kept_the_first_among_them() -> None:
    spectra = SpectraOverTime()
    for step in range(100):
        layer = SimpleNamespace(factors={"A": torch.eye(2)[None] * (step + 1), "G": torch.eye(1)[None]})
        dense_block = SimpleNamespace(factors={"F": torch.eye(2)[None]})
        spectra.take(step, {"conv": layer, "norm": dense_block})  # type: ignore[dict-item]  # stands in for a layer
        spectra.take(step, {"conv": layer})  # type: ignore[dict-item]  # stands in for a layer
        kept = spectra.by_layer()["conv"]["A"]
        assert len(kept) <= snapshots.MOST_TIMES
        assert kept[0][0] == 0
        assert kept == sorted(kept, key=lambda entry: entry[0])
        assert all(float(values[0]) == at + 1 for at, values in kept)
    assert len(kept) > snapshots.MOST_TIMES // 2 - 1
    assert set(spectra.by_layer()) == {"conv"}


def test_of_many_layers_evenly_spread_ones_are_shown() -> None:
    assert shown(["a", "b"]) == ["a", "b"]
    names = [str(i) for i in range(53)]
    found = shown(names)
    assert len(found) == snapshots.MOST_LAYERS
    assert found[0] == "0"
    assert found[-1] == "52"
    assert found == sorted(set(found), key=int)
