"""Each picture shows the numbers it was given, in encodings that stand alone."""

from __future__ import annotations

import ast
import importlib.util
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import lightning_kfc
from lightning_kfc.monitoring.spatial import SpatialStatistics
from lightning_kfc.pictures import (
    draw_autocorrelation,
    draw_coverage,
    draw_factors,
    draw_numbers,
    draw_spectra,
    draw_step_time,
    png,
    svg,
)
from lightning_kfc.pictures.draw import HEAT_MAP_PIXELS
from tests.helpers.nets import data

pytestmark = pytest.mark.slow


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]


def line(axis: Any, number: int = 0) -> list[float]:
    return [float(y) for y in axis.get_lines()[number].get_ydata()]


def image(axis: Any) -> Tensor:
    return torch.tensor(axis.get_images()[0].get_array().tolist())


def test_spectra_have_a_line_for_each_time_and_no_eigenvalue_that_is_rounding() -> None:
    values = torch.tensor([4.0, 1.0, 1e-3, 4e-8, 0.0])
    figure = draw_spectra({"conv": {"A": [(0, values), (5, 2 * values)], "G": [(0, values[:2])]}})
    assert titles(figure) == ["conv  A (5)", "conv  G (2)"]
    first, second = figure.axes
    assert line(first)[:3] == pytest.approx([4, 1, 1e-3])
    assert all(math.isnan(v) for v in line(first)[3:])
    assert line(first, 1)[:3] == pytest.approx([8, 2, 2e-3])
    assert first.get_yscale() == "log"
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["step 0", "step 5"]
    assert len(second.get_lines()) == 1


def test_factors_are_drawn_as_correlations_the_first_of_several_groups_and_no_diagonal() -> None:
    factor = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    figure = draw_factors({"a": {"A": torch.stack([factor, torch.eye(3)]), "G": torch.ones(2, 5)}})
    assert titles(figure) == ["a  A (3)"]
    assert torch.equal(image(figure.axes[0]), torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]]))


def test_a_large_factor_is_averaged_down() -> None:
    size = 2 * HEAT_MAP_PIXELS
    figure = draw_factors({"a": {"A": torch.ones(size, size)}})
    assert image(figure.axes[0]).shape == (HEAT_MAP_PIXELS, HEAT_MAP_PIXELS)
    assert float(image(figure.axes[0]).min()) == 1


def test_autocorrelation_maps_are_labelled_by_offset() -> None:
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 1.0, 0.4], [0.3, 0.2, 0.1]])
    statistics = [
        SpatialStatistics("c1", "activations", values, 0.5, 8),
        SpatialStatistics("c1", "derivatives", -values, 0.5, 8),
        SpatialStatistics("c2", "derivatives", values, 0.5, 8),
    ]
    figure = draw_autocorrelation(statistics)
    assert titles(figure) == [
        "c1  activations\nnearest 0.30",
        "c1  derivatives\nnearest -0.30",
        "c2  derivatives\nnearest 0.30",
    ]
    assert torch.equal(image(figure.axes[1]), -values)
    assert figure.axes[0].get_images()[0].get_extent() == [-1.5, 1.5, 1.5, -1.5]


def test_numbers_have_a_panel_for_each_key_and_a_gap_where_they_are_not_finite() -> None:
    history = {
        "loss": [(0, 2.0), (5, math.inf), (10, 0.01)],
        "kfc/damping": [(0, 0.1), (5, 0.1)],
        "signed": [(0, -1.0), (5, 100.0)],
        "once": [(3, 1.0)],
    }
    figure = draw_numbers(history)
    assert titles(figure) == list(history)
    assert [axis.get_yscale() for axis in figure.axes[:3]] == ["log", "linear", "linear"]
    assert math.isnan(line(figure.axes[0])[1])
    assert line(figure.axes[0])[::2] == [2.0, 0.01]
    assert len(figure.axes) == 6
    assert [axis.axison for axis in figure.axes] == [True] * 4 + [False] * 2


def test_step_time_is_one_bar_whose_parts_add_up() -> None:
    figure = draw_step_time({"rest": 0.03, "statistics": 0.01})
    (axis,) = figure.axes
    assert [(b.get_x(), b.get_width()) for b in axis.patches] == [(0, pytest.approx(30)), (pytest.approx(30), 10)]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["rest: 30 ms (75.0%)", "statistics: 10 ms (25.0%)"]


def test_coverage_is_drawn_as_it_prints() -> None:
    table = "Layer $x$  Kind\nconv_1     Conv"
    assert draw_coverage(table).axes[0].texts[0].get_text() == table
    assert "conv_1" in svg(draw_coverage(table))


def test_nothing_recorded_is_a_picture_that_reports_it() -> None:
    for figure in (draw_spectra({}), draw_factors({}), draw_autocorrelation([])):
        assert titles(figure) == ["nothing was recorded yet"]
        assert png(figure)
    assert png(draw_numbers({}))
    assert png(draw_step_time({"rest": 0.0}))


def test_encodings_stand_alone_and_do_not_change_from_run_to_run() -> None:
    def figure() -> Any:
        return draw_factors({"<a> & b": {"A": data(4, 4) @ data(4, 4).T}})

    drawn = svg(figure())
    assert drawn == svg(figure())
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    references = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith(("href", "src"))]
    assert references
    assert all(v.startswith(("#", "data:image/png;base64,")) for v in references)
    assert "&lt;a&gt; &amp; b  A (4)" in drawn
    encoded = png(figure())
    assert encoded == png(figure())
    width, height = struct.unpack(">II", encoded[16:24])
    assert encoded.startswith(b"\x89PNG")
    assert width > 200
    assert height > 200


def test_a_picture_leaves_the_user_s_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31.0}):
        draw_numbers({"a": [(0, 1.0)]})
        assert mpl.rcParams["font.size"] == 31.0


def test_without_matplotlib_a_picture_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        draw_numbers({})


def test_no_module_needs_matplotlib_when_it_is_imported() -> None:
    def needed(body: list[ast.stmt]) -> Iterator[str]:
        for statement in body:
            if isinstance(statement, ast.Import):
                yield from (alias.name for alias in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                yield statement.module or ""

    modules = sorted(Path(lightning_kfc.__file__).parent.rglob("*.py"))
    assert "canvas.py" in {module.name for module in modules}
    names = {str(module): [*needed(ast.parse(module.read_text("utf-8")).body)] for module in modules}
    assert {file: needs for file, needs in names.items() if any(name.startswith("matplotlib") for name in needs)} == {}
