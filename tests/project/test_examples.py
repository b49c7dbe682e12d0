"""The examples' shared table and data, and the page that lists them; ``examples/run_all.py`` runs each one in small."""

from __future__ import annotations

import ast
import re
from types import ModuleType

import pytest
import torch

from tests.project.test_demo import ROOT, load_example

pytestmark = pytest.mark.slow

EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.name != "run_all.py" and not p.name.startswith("_"))
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    return load_example("_shared")


def test_page_lists_every_example_with_its_command_and_no_other() -> None:
    listed = re.findall(r"python examples/(\w+\.py)", PAGE)
    assert sorted(set(listed)) == [path.name for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_how_it_is_run(path) -> None:
    described = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert described is not None
    assert f"python examples/{path.name}" in described or "make demo" in described


def test_table_shows_each_run_at_five_moments_and_its_seconds(shared: ModuleType) -> None:
    def history(offset: float, seconds: float):
        rows = [(step, {"loss": step + offset}) for step in range(10, 101, 10)]
        return shared.History(rows, seconds)

    rows = shared.table({"one": history(0.25, 1.5), "two": history(0.5, 20.0)}).splitlines()
    assert rows[0].split() == ["one", "two"]
    assert [row.split()[1:] for row in rows[1:6]] == [
        ["step", str(step), f"{step}.2500", f"{step}.5000"] for step in (10, 30, 50, 80, 100)
    ]
    assert rows[6].split() == ["seconds", "1.5", "20.0"]


def test_runs_start_from_the_same_random_state_and_keep_their_own_history(shared: ModuleType, capsys) -> None:
    drawn, given = [], []

    def fit(optimizer, callbacks) -> None:
        drawn.append(torch.rand(3))
        given.append((optimizer, callbacks[1:]))
        callbacks[0].rows.append((1, {"loss": float(len(drawn))}))

    state = torch.random.get_rng_state()
    histories = shared.compare({"a": ("A", ["callback"]), "b": ("B", [])}, fit)
    torch.random.set_rng_state(state)
    assert torch.equal(drawn[0], drawn[1])
    assert given == [("A", ["callback"]), ("B", [])]
    assert [history.rows for history in histories.values()] == [[(1, {"loss": 1.0})], [(1, {"loss": 2.0})]]
    assert "1.0000                  2.0000" in capsys.readouterr().out


def test_digits_to_train_on_and_those_held_out_are_apart_and_even(shared: ModuleType) -> None:
    train_images, train_labels, test_images, test_labels = shared.mnist_split(4096)
    assert (train_images.shape, test_images.shape) == ((4096, 1, 28, 28), (904, 1, 28, 28))
    assert (float(train_images.min()), float(train_images.max())) == (0.0, 1.0)
    assert set(train_labels.bincount().tolist()) <= {409, 410}
    assert set(test_labels.bincount().tolist()) <= {90, 91}
    rows = {row.numpy().tobytes() for row in train_images}
    assert not rows & {row.numpy().tobytes() for row in test_images}
