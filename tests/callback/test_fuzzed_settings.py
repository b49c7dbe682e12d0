"""Any value of any option is a clear error before the first step, or a training that does not raise."""

from __future__ import annotations

import inspect
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    *(RefreshTiming(False, 0.1), Precision("bfloat16"), Logging(layers=True)),
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
