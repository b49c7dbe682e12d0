"""LightningCLI: the callback and its schedules from YAML and from the command line; `examples/digits_cli.py`."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

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
from lightning_kfc.callback.former_options import FormerOptions
from lightning_kfc.settings import FORMER
from tests.helpers.lightning_nets import QUIET

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = str(EXAMPLES / "digits_cli.yaml")
FAST = ["--trainer.fast_dev_run=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

pytestmark = [*QUIET, pytest.mark.slow]


@pytest.fixture(scope="module")
def cli():
    """The example's main function."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import digits_cli

        yield digits_cli.main
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _as_a_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["digits_cli.py"])
    # LightningCLI itself uses what jsonargparse deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def settings_of(ran):
    (callback,) = (c for c in ran.trainer.callbacks if isinstance(c, KFCCallback))
    assert callback.kfc.step == 1  # both steps of fast_dev_run were preconditioned
    return callback.kfc.settings


def written(tmp_path, callbacks):
    """A config file with these callbacks."""
    config = yaml.safe_load(Path(CONFIG).read_text())
    config["trainer"]["callbacks"] = callbacks
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def entry(class_path="lightning_kfc.KFCCallback", **init_args):
    return {"class_path": class_path, "init_args": init_args}


def test_the_example_trains_from_its_config(cli):
    ran = cli(["fit", "--config", CONFIG, "--trainer.enable_progress_bar=false"])
    assert ran.trainer.callback_metrics["accuracy"] > 0.9
    (callback,) = (c for c in ran.trainer.callbacks if isinstance(c, KFCCallback))
    assert callback.kfc.settings.damping == ExponentialSchedule(0.1, 0.003, 30)
    assert all(layer.inverse is not None for layer in callback.kfc.layers.values())


def test_the_command_line_overrides_the_config(cli):
    given = ["--trainer.callbacks.damping=0.25", "--trainer.callbacks.kl_clip=null", "--trainer.callbacks.fisher=exact"]
    settings = settings_of(cli(["fit", "--config", CONFIG, *FAST, *given, "--trainer.callbacks.exclude=[net.0]"]))
    assert (settings.damping, settings.kl_clip, settings.fisher) == (0.25, None, "exact")
    assert settings.exclude == ("net.0",)


def test_the_callback_is_added_on_the_command_line_alone(cli):
    given = ["--trainer.callbacks+=lightning_kfc.KFCCallback", "--trainer.callbacks.damping=0.03"]
    assert (
        settings_of(cli(["fit", *FAST, "--trainer.accelerator=cpu", "--trainer.logger=false", *given])).damping == 0.03
    )


def test_the_short_name_of_an_imported_class_is_enough(cli, tmp_path):
    config = written(tmp_path, [entry("KFCCallback", damping=0.04)])
    assert settings_of(cli(["fit", "--config", config, *FAST])).damping == 0.04


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        (
            "damping",
            entry("lightning_kfc.LinearSchedule", start=1.0, end=0.1, steps=3),
            LinearSchedule(1.0, 0.1, 3),
        ),
        (
            "damping",
            entry("lightning_kfc.ExponentialSchedule", start=1.0, end=0.1, steps=3),
            ExponentialSchedule(1.0, 0.1, 3),
        ),
        ("likelihood", entry("lightning_kfc.Categorical", output_of="net"), Categorical(output_of="net")),
        ("likelihood", entry("lightning_kfc.Gaussian", output_of="net"), Gaussian(output_of="net")),
        ("likelihood", entry("lightning_kfc.Bernoulli", output_of="net", reduction="sum"), Bernoulli("net", "sum")),
        ("likelihood", "categorical", "categorical"),
        ("rule", "adam", "adam"),
        ("timing", {"max_overhead": 0.1}, RefreshTiming(max_overhead=0.1)),
        ("timing", {"stagger_inverses": False}, RefreshTiming(stagger_inverses=False)),
        ("precision", {"inverses": "bfloat16"}, Precision(inverses="bfloat16")),
        ("include", "net.[07]", ("net.[07]",)),
    ],
)
def test_what_yaml_sets_arrives_and_survives_print_config(cli, tmp_path, capsys, option, given, expected):
    config = written(tmp_path, [entry(**{option: given})])
    assert getattr(settings_of(cli(["fit", "--config", config, *FAST])), option) == expected
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli(["fit", "--config", config, *FAST, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert getattr(settings_of(cli(["fit", "--config", str(printed)])), option) == expected


def test_options_of_groups_are_set_on_the_command_line(cli, tmp_path):
    config = written(tmp_path, [entry(timing={"stagger_inverses": False}, logging={"layers": True})])
    given = ["timing.max_overhead=0.1", "precision.inverses=bfloat16", f"logging.report_dir={tmp_path}"]
    ran = cli(["fit", "--config", config, *FAST, *(f"--trainer.callbacks.{each}" for each in given)])
    settings = settings_of(ran)
    assert settings.timing == RefreshTiming(stagger_inverses=False, max_overhead=0.1)
    assert settings.precision == Precision(inverses="bfloat16")
    (callback,) = (c for c in ran.trainer.callbacks if isinstance(c, KFCCallback))
    assert callback.logging == Logging(layers=True, report_dir=str(tmp_path))
    assert (tmp_path / "report.html").exists()


def test_the_help_explains_every_option(cli, capsys):
    with pytest.raises(SystemExit):
        cli(["fit", "--trainer.callbacks.help", "lightning_kfc.KFCCallback"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Preconditions gradients with KFC (Grosse & Martens 2016)" in shown
    parameters = [(n, p) for n, p in inspect.signature(KFCCallback).parameters.items() if p.kind != p.VAR_KEYWORD]
    groups = {name: [field.name for field in fields(p.default)] for name, p in parameters if is_dataclass(p.default)}
    assert set(groups) == {"timing", "precision", "logging"}
    options = [rf"{name}\.{each}" for name in groups for each in groups[name]]
    options += [name for name, _ in parameters if name not in groups]
    assert len(options) > 10
    for option in options:
        # Its name, at least five words on it, and its type.
        assert re.search(rf"--trainer\.callbacks\.{option} \S+.{{0,90}}? (\S+ ){{5,}}.*?\(type: ", shown), option
    assert "Untyped" not in shown
    assert "--trainer.callbacks.removed" not in shown
    assert "(type: Union[float, Literal['auto'], ExponentialSchedule, LinearSchedule], default: auto" in shown


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("damping", "abc", r'"damping"[\s\S]*Given value: abc'),
        ("damping", -1.0, r"damping must be a positive number, got -1.0"),
        ("fisher", "true", r""""fisher":\s+Expected a typing.Literal\['mc', 'exact', 'empirical'\]. Got value: true"""),
        ("factor_every_n_steps", 1.5, r""""factor_every_n_steps":[\s\S]*Given value: 1.5"""),
        ("warmup_steps", "ten", r""""warmup_steps":\s+Expected a <class 'int'>. Got value: ten"""),
        ("ema_decay", 2, r"ema_decay must be at least 0 and below 1, got 2"),
        ("dampng", 0.1, r"'dampng' is not accepted"),
        ("timing", {"max_overhed": 0.1}, r"max_overhed"),
        ("timing", {"max_overhead": 0}, r"timing.max_overhead must be a positive number, got 0"),
        ("precision", {"inverses": "half"}, r"inverses[\s\S]*half"),
        ("logging", {"pictures_every_n_steps": 0}, r"logging.pictures_every_n_steps must be at least 1, got 0"),
        ("save_factors", "maybe", r""""save_factors":\s+Expected a <class 'bool'>. Got value: maybe"""),
    ],
)
def test_a_wrong_value_in_yaml_is_refused_naming_option_and_value(cli, tmp_path, capsys, option, value, said):
    config = written(tmp_path, [entry(**{option: value})])
    with pytest.raises((SystemExit, ValueError)) as raised:
        cli(["fit", "--config", config, *FAST])
    shown = capsys.readouterr().err + str(raised.value)
    assert re.search(said, shown), shown


@pytest.mark.parametrize("option", sorted(FORMER))
def test_an_option_of_an_earlier_version_is_an_error_with_the_way_out(cli, tmp_path, option):
    assert set(FormerOptions.__annotations__) == set(FORMER)
    config = written(tmp_path, [entry(**{option: 1})])
    with pytest.raises(ValueError, match=re.escape(FORMER[option])):
        cli(["fit", "--config", config, *FAST])
    with pytest.raises(ValueError, match=re.escape(FORMER[option])):
        cli(["fit", "--config", CONFIG, *FAST, f"--trainer.callbacks.{option}=1"])
