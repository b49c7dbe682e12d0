"""Any value of any option is a clear error before the first step, or a training that does not raise."""

from __future__ import annotations

import contextlib
import functools
import inspect
from argparse import ArgumentError
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lightning_kfc import (
    Bernoulli,
    Categorical,
    ExponentialSchedule,
    Gaussian,
    KFCCallback,
    LinearSchedule,
    Logging,
    Precision,
    RefreshTiming,
)
from lightning_kfc.losses.selection import LossNotRecognisedError
from tests.helpers.harness import Classifier, fit

OPTIONS = [n for n, p in inspect.signature(KFCCallback).parameters.items() if p.kind is not p.VAR_KEYWORD]

#: What people give: right and wrong types, other packages' numbers, the ends of ranges, things of another option.
VALUES: list[Any] = [
    None,
    *(True, False, 0, 1, 2, 3, -1, 10**30, 10**400, 0.5, 1.0, 0.999999, -0.0, 5e-324, 1e-30, 1e30),
    *(float("nan"), float("inf"), 1 + 1j, Fraction(1, 2), Decimal("0.1")),
    *("", "auto", "mc", "exact", "adam", "eigh", "ekfac", "reduce", "mem-opt", "gaussian", "0", "net.*", b"x"),
    *([], ["net.0"], ["", "nope"], ("net.3",), {}, {"a": 1}, range(3), object(), int),
    *(np.float32(0.1), np.int64(3), np.bool_(True), np.array(0.1), np.ones(2), torch.tensor(0.1), torch.ones(2)),
    *(lambda step: 0.1, lambda step: torch.tensor(0.1), lambda step: float("nan"), lambda step: None, lambda: 1),
    *(LinearSchedule(1.0, 0.1, 3), ExponentialSchedule(1.0, 0.1, 3)),
    *(Categorical(), Gaussian(), Bernoulli(), Categorical(output_of="net"), Gaussian(output_of="nope")),
    *(RefreshTiming(stagger_inverses=False, max_overhead=0.1), Precision("bfloat16"), Logging(layers=True)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(OPTIONS), st.sampled_from(VALUES), min_size=1, max_size=3))
def test_any_settings_are_an_error_that_names_one_of_them_or_train(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, steps, raised = Classifier(), 4, ""
    try:
        fit(module, kfc=KFCCallback(**options), max_steps=steps)
    except (TypeError, ValueError, LossNotRecognisedError) as error:
        raised = str(error)
    if raised:
        assert any(name in raised for name in options) or "no layer" in raised, raised
        assert len(module.losses) <= 1, f"raised at step {len(module.losses) - 1}"
    else:
        assert len(module.losses) == steps
        assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


#: What YAML files hold: numbers in all spellings, words of other options, half-written entries, objects by class path.
TEXTS = [
    *(
        "1",
        "-3",
        "0",
        "10",
        "1_000",
        "0x10",
        "1e3",
        "1e999",
        ".nan",
        "-.inf",
        "0.5",
        "'0.1'",
        "1.",
        "0.3.4",
        "2020-01-01",
    ),
    *("auto", "null", "~", "true", "yes", "None", "natural", "adam", "exact", "ekfac", "net.*", "''", "!!binary aGk="),
    *("[1, 2]", "[net.0, net.3]", "[]", "{}", "{a: 1}", "{max_overhead: 0.1}", "{inverses: half}", "{layers: 2}"),
    "{class_path: lightning_kfc.LinearSchedule}",
    "{class_path: lightning_kfc.LinearSchedule, init_args: {start: 1, end: 0, steps: 3}}",
    "{class_path: lightning_kfc.ExponentialSchedule, init_args: {start: 1, end: 0.1, steps: 3}}",
    "{class_path: lightning_kfc.Gaussian, init_args: {output_of: net}}",
    "{class_path: lightning_kfc.Gaussian, init_args: {output_of: nope}}",
    "{class_path: lightning_kfc.Nothing}",
    "lightning_kfc.Categorical",
]
WORDS = st.text("abc 0123.*-_~:[]{}'", max_size=4)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
MADE = st.recursive(SCALARS, lambda each: st.lists(each, max_size=2) | st.dictionaries(WORDS, each, max_size=2))
YAML = st.sampled_from(TEXTS) | MADE.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip(" .\n"))
GROUPS = ("timing", "precision", "logging")


def traces_of(value: object) -> set[str]:
    """The ways in which a message may show a value of YAML, or a part of it."""
    parts = [*value, *(value.values() if isinstance(value, dict) else ())] if isinstance(value, list | dict) else []
    traces = {str(value), repr(value)}.union(*map(traces_of, parts))
    if value == {}:
        # The parser fills an empty mapping with the fields of a class that it tries.
        traces.add("Namespace(")
    with contextlib.suppress(TypeError, ValueError):
        traces.add(repr(float(value)))  # type: ignore[arg-type]  # that is refused
    return traces


@functools.cache
def command_line() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    # The type of the Trainer's own argument, which `LightningCLI` has.
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    return parser


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.sampled_from(OPTIONS), YAML)
def test_any_yaml_value_is_an_error_that_names_it_and_the_setting_or_trains(option: str, text: str) -> None:
    torch.manual_seed(0)
    module, steps, raised = Classifier(), 2, ""
    entry = {"class_path": "lightning_kfc.KFCCallback", "init_args": {option: "<VALUE>"}}
    config = yaml.safe_dump({"callbacks": [entry]}).replace("<VALUE>", text)
    try:
        parser = command_line()
        (callback,) = parser.instantiate(parser.parse_string(config)).callbacks
        fit(module, kfc=callback, max_steps=steps)
    except (ArgumentError, TypeError, ValueError, LossNotRecognisedError) as error:
        raised = str(error)
    if raised:
        assert len(module.losses) <= 1
        assert "no layer" in raised or any(trace in raised for trace in traces_of(yaml.safe_load(text))), raised
        # The parser's own error of a group names it in the list of all options alone, with which the message ends.
        said = raised if option in GROUPS else raised.partition("Given value: [Namespace(")[0]
        assert option in said or "end must be" in said, raised
    else:
        assert len(module.losses) == steps
        assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
