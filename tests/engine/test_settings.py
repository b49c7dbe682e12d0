"""Settings are checked before the first step, by errors that name the setting, the value and the way out."""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFC, Gaussian, KFCCallback, LinearSchedule, Precision, RefreshTiming
from lightning_kfc.settings import CALLBACK_DEFAULTS, FORMER, MOVED, Options, Settings
from tests.helpers.nets import classes, data, double, engine, train_step

TARGETS = classes(3, count=2)
NAN, INF = float("nan"), float("inf")

WRONG: list[tuple[str, Any, type[Exception], str]] = [
    *[("damping", v, ValueError, f"damping must be a positive number, got {v!r}") for v in (0, -0.1, NAN, INF)],
    *[("damping", v, TypeError, f"damping must be a number or 'auto', got {v!r} of type") for v in (None, True)],
    ("damping", "0.1", TypeError, "damping must be a number or 'auto', got '0.1' of type str"),
    *[("kl_clip", v, ValueError, f"kl_clip must be a positive number, got {v!r}") for v in (0.0, -1, NAN)],
    ("kl_clip", "none", TypeError, "kl_clip must be a number or 'auto', got 'none' of type str"),
    *[("ema_decay", v, ValueError, f"ema_decay must be at least 0 and below 1, got {v!r}") for v in (1.0, -0.1, NAN)],
    ("ema_decay", [0.9], TypeError, r"ema_decay must be a number, got \[0.9\] of type list"),
    ("fisher", "montecarlo", ValueError, "fisher must be one of 'mc', 'exact', 'empirical', got 'montecarlo'"),
    ("fisher", ["mc"], ValueError, r"fisher must be one of .*, got \['mc'\]"),
    ("likelihood", "softmax", ValueError, "likelihood must be one of 'auto', 'categorical', 'bernoulli', 'gaussian'"),
    ("likelihood", Gaussian, TypeError, "likelihood must be an instance, such as Gaussian"),
    ("inverse", "lu", ValueError, "inverse must be one of 'cholesky'"),
    ("rule", "sgd", ValueError, "rule must be one of 'natural', 'adam', 'auto', got 'sgd'"),
    ("weight_sharing", "share", ValueError, "weight_sharing must be one of 'expand', 'reduce', got 'share'"),
    ("placement", "memopt", ValueError, "placement must be one of 'auto', 'comm-opt', 'mem-opt', got 'memopt'"),
    ("placement", 0, ValueError, "placement must be a positive number, got 0"),
    ("placement", 1.5, ValueError, "placement is a fraction of the ranks, at most 1, got 1.5"),
    ("placement", None, TypeError, "placement must be a number, got None"),
    *[
        (name, v, error, message.format(name))
        for name in ("factor_every_n_steps", "inverse_every_n_steps")
        for v, error, message in (
            (0, ValueError, "{} must be at least 1, got 0"),
            (2.0, TypeError, "{} must be a whole number, got 2.0 of type float"),
            ("often", TypeError, "{} must be a whole number or 'auto', got 'often' of type str"),
            (True, TypeError, "{} must be a whole number, got True of type bool"),
        )
    ],
    ("warmup_steps", -1, ValueError, "warmup_steps must be at least 0, got -1"),
    ("timing", {"max_overhead": 0.1}, TypeError, r"timing must be given as timing=RefreshTiming\(...\), got {.*dict"),
    ("timing", Precision(), TypeError, r"timing must be given as timing=RefreshTiming\(...\), got Precision\("),
    ("precision", "bfloat16", TypeError, r"precision must be given as precision=Precision\(...\), got 'bfloat16' of"),
    *[(name, 10**30, ValueError, f"{name} must be at most 9223372036854775807") for name in ("seed", "warmup_steps")],
    *[(name, 10**400, ValueError, f"{name} must be a positive number, got 1000") for name in ("damping", "kl_clip")],
    ("damping", np.ones(2), TypeError, r"damping must be a number or 'auto', got array\(\[1., 1.\]\) of type ndarray"),
    ("factor_every_n_steps", np.ones(2), TypeError, r"factor_every_n_steps must be a whole number, got array"),
    ("include", torch.tensor(3), TypeError, r"include takes glob patterns over module names.*got tensor\(3\) of"),
    ("seed", -1, ValueError, "seed must be at least 0, got -1"),
    ("seed", "0", TypeError, "seed must be a whole number, got '0' of type str"),
    ("include", [3], TypeError, r"include takes glob patterns over module names.*got 3 of type int"),
    ("include", 3, TypeError, r"include takes glob patterns over module names.*got 3 of type int"),
    ("exclude", {"a": 1, 2: 2}, TypeError, r"exclude takes glob patterns over module names.*got 2 of type int"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=lambda v: repr(v)[:20])
def test_a_wrong_setting_is_an_error_naming_it_and_its_value(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KFC(nn.Linear(2, 2), **{name: value})
    with pytest.raises(error, match=message):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("group", "name", "value", "error", "message"),
    [
        (RefreshTiming, "max_overhead", 0.0, ValueError, r"timing\.max_overhead must be a positive number, got 0\.0"),
        (RefreshTiming, "max_overhead", "a", TypeError, r"timing\.max_overhead must be a number, got 'a' of type str"),
        (RefreshTiming, "stagger_inverses", 1, TypeError, r"timing\.stagger_inverses must be true or false, got 1"),
        (
            Precision,
            "inverses",
            "half",
            ValueError,
            r"precision\.inverses must be one of 'full', 'bfloat16', got 'half'",
        ),
    ],
)
def test_a_wrong_value_in_a_group_is_an_error_naming_group_option_and_value(
    group: Any, name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        group(**{name: value})


def test_the_callback_refuses_a_mapping_for_a_group() -> None:
    with pytest.raises(TypeError, match=r"logging must be given as logging=Logging\(...\), got {'layers': True} of"):
        KFCCallback(logging={"layers": True})  # type: ignore[arg-type]  # what is tested


def way_out(name: str) -> str:
    if name not in MOVED:
        return rf"^{name} was removed: .*\. Leave it out\.$"
    kind, option, field = MOVED[name]
    default = inspect.signature(KFCCallback).parameters[option].default
    assert type(default).__name__ == kind
    assert field in {entry.name for entry in fields(default)}
    return rf"^{name} is now {option}={kind}\({field}=\.\.\.\).*, in YAML {option}\.{field}\.$"


@pytest.mark.parametrize("name", sorted(FORMER))
def test_a_setting_of_an_earlier_version_is_an_error_naming_it_and_the_way_out(name: str) -> None:
    with pytest.raises(TypeError, match=way_out(name)):
        KFC(nn.Linear(2, 2), **{name: None})
    with pytest.raises(TypeError, match=way_out(name)):
        Settings(**{name: None})
    with pytest.raises(TypeError, match=way_out(name)):
        KFCCallback(**{name: None})


def test_numbers_of_other_packages_are_taken_as_python_s_own() -> None:
    given = {"seed": np.int64(3), "damping": Fraction(1, 2), "kl_clip": np.float32(0.5), "warmup_steps": np.int8(2)}
    settings = Settings(**given)
    assert {name: (type(value), value) for name in given for value in [getattr(settings, name)]} == {
        "seed": (int, 3),
        "damping": (float, 0.5),
        "kl_clip": (float, 0.5),
        "warmup_steps": (int, 2),
    }
    assert type(KFCCallback(average_weights=Fraction(1, 2)).average_weights) is float


@pytest.mark.parametrize("schedule", [lambda step: None, lambda: 0.1, lambda step: [0.1], lambda step: 10**400])
def test_a_schedule_that_gives_no_number_is_an_error_at_the_first_step(schedule: Any) -> None:
    model = nn.Linear(2, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^damping at step 0 could not be computed \(\w+: .*\)\. Give a number, or"):
        train_step(engine(model, damping=schedule), optimizer, lambda: F.cross_entropy(model(data(3, 2)), TARGETS))


def test_a_schedule_that_raises_later_leaves_its_last_value_in_force() -> None:
    model = nn.Linear(2, 2).double()
    kfc, optimizer = engine(model, damping=[0.3, 0.2].__getitem__), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        catch = pytest.warns(UserWarning, match="could not be computed") if step == 2 else contextlib.nullcontext()
        with catch:
            train_step(kfc, optimizer, lambda: F.cross_entropy(model(data(3, 2)), TARGETS))
    assert kfc.damping == 0.2
    assert kfc.events.invalid_dampings == 2


def test_a_setting_that_never_was_is_an_error_naming_it() -> None:
    with pytest.raises(TypeError, match=r"^KFC has no setting 'dampng'. Did you mean 'damping'\?$"):
        KFC(nn.Linear(2, 2), dampng=0.1)
    with pytest.raises(TypeError, match=r"^KFCCallback has no setting 'warmup'. Did you mean 'warmup_steps'\?$"):
        KFCCallback(warmup=3)
    with pytest.raises(TypeError, match=r"^KFCCallback has no setting 'average'. Did you mean 'average_weights'\?$"):
        KFCCallback(average=0.5)
    with pytest.raises(TypeError, match=r"^Settings has no setting 'lr'. Its settings are: damping, ema_decay, "):
        Settings(lr=0.1)  # type: ignore[call-arg]  # what is tested


@pytest.mark.parametrize(
    "settings",
    [
        {"damping": 1},
        {"damping": LinearSchedule(1.0, 0.1, 5)},
        {"damping": lambda step: 0.1},
        {"kl_clip": None},
        {"ema_decay": 0},
        {"include": "fc*"},
        {"include": ("fc*",), "exclude": ["fc2"]},
        {"warmup_steps": 0},
    ],
)
def test_these_settings_are_right(settings: dict[str, Any]) -> None:
    model = nn.Sequential()
    for name in ("fc1", "fc2"):
        model.add_module(name, nn.Linear(2, 2))
    assert KFC(model, **settings).layers


def test_a_single_pattern_is_a_list_of_one() -> None:
    assert Settings(include="fc*").include == ("fc*",)


def test_a_damping_schedule_that_leaves_the_positive_numbers_is_reported_once_and_its_last_valid_value_stays() -> None:
    model = double(nn.Linear(3, 3))
    kfc = engine(model, damping=lambda step: 0.1 - 0.1 * step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(data(4, 3)), classes(4, count=3))

    train_step(kfc, optimizer, loss)
    with pytest.warns(
        UserWarning, match=r"damping at step 1 must be a positive number, got 0\.0; 0\.1 is used instead"
    ):
        train_step(kfc, optimizer, loss)
    train_step(kfc, optimizer, loss)
    assert kfc.last_step is not None
    assert kfc.last_step.damping == 0.1
    assert kfc.events.invalid_dampings == 2


def test_a_damping_schedule_that_begins_outside_the_positive_numbers_is_an_error_at_the_first_step() -> None:
    model = double(nn.Linear(3, 3))
    kfc = engine(model, damping=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"damping at step 0 must be a positive number, got -1\.0"):
        train_step(
            kfc,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda: F.cross_entropy(model(data(4, 3)), classes(4, count=3)),
        )


def test_the_damping_of_a_step_is_the_schedule_s_value_at_it() -> None:
    model = double(nn.Linear(3, 3))
    kfc = engine(model, damping=LinearSchedule(1.0, 3.0, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(4):
        train_step(kfc, optimizer, lambda: F.cross_entropy(model(data(4, 3)), classes(4, count=3)))
        assert kfc.last_step is not None
        seen.append(kfc.last_step.damping)
    assert seen == [1.0, 2.0, 3.0, 3.0]


def test_a_placement_that_the_inverse_cannot_have_is_an_error_that_names_one_that_can() -> None:
    with pytest.raises(ValueError, match=r"Use placement='comm-opt', or inverse='eigh'"):
        Settings(inverse="ekfac", placement="mem-opt")
    assert Settings(inverse="ekfac", placement="comm-opt").placement == "comm-opt"


def test_the_typed_options_are_the_settings_and_the_callback_has_them_all() -> None:
    names = {field.name: field for field in fields(Settings) if field.init}
    assert set(Options.__annotations__) == set(names)
    assert {name: hint.__forward_arg__ for name, hint in Options.__annotations__.items()} == {
        name: field.type for name, field in names.items()
    }
    shown = inspect.signature(KFCCallback).parameters
    assert set(names) <= set(shown)
    for name, field in names.items():
        assert shown[name].default == CALLBACK_DEFAULTS.get(name, field.default), name
        for owner, times in ((Settings, 1), (KFCCallback, 1), (KFC, 0)):
            found = re.findall(rf"^    +{name}: \S", owner.__doc__ or "", re.MULTILINE)
            assert len(found) == times, (owner, name)
    assert "lightning_kfc.settings.Settings" in (KFC.__doc__ or "")


def test_settings_may_be_given_whole_with_options_that_replace_some() -> None:
    model, given = nn.Linear(2, 2), Settings(damping=0.5, seed=3)
    kfc = KFC(model, settings=given, damping=0.25)
    assert kfc.given_settings == replace(given, damping=0.25)
    assert KFC(model, settings=given).given_settings == given
    assert KFC(model).given_settings == Settings()
    with pytest.raises(TypeError, match=r"^KFC has no setting 'schedule'"):
        KFC(model, settings=given, schedule=None)  # type: ignore[call-arg]  # computed, not given
