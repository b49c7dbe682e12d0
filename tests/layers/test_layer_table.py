"""The documentation's table of layers: made from the registry, and backed by the tests that it names."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lightning_kfc.layers import ParameterAdapter
from lightning_kfc.layers.registry import registered_adapters

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``docs/generate_layer_table.py`` as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("generate_layer_table", ROOT / "docs" / "generate_layer_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_the_one_that_the_registry_gives(generator: ModuleType) -> None:
    committed = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    assert committed == generator.page(), "run: python docs/generate_layer_table.py"


def test_every_adapter_has_its_lines_and_no_line_is_of_an_adapter_that_is_gone(generator: ModuleType) -> None:
    built_in = {a.__name__ for a in registered_adapters() if a.__module__.startswith("lightning_kfc.")}
    assert set(generator.CASES) == built_in | {ParameterAdapter.__name__}


def test_every_line_has_a_verdict_and_names_tests_that_exist(generator: ModuleType) -> None:
    for adapter, cases in generator.CASES.items():
        for case in cases:
            assert case.verdict in ("exact", "approximate", "plain"), (adapter, case.options)
            assert case.tests, (adapter, case.options)
            for test in case.tests:
                file, _, name = test.partition("::")
                text = (ROOT / "tests" / file).read_text(encoding="utf-8")
                assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{adapter}: {test} is no test"
