"""The choice of the rule for "auto", with its message."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_kfc import KFC, KFCCallback, Precision
from lightning_kfc.rules.adam import adam_step
from tests.helpers.harness import QUIET, Classifier, dense_net, fit
from tests.helpers.nets import classes, data, train_step

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def transformer(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, width), layer, nn.Linear(width, 3)).double()


AUTO: dict[str, Any] = {"rule": "auto", "damping": "auto", "kl_clip": "auto"}


def test_a_narrow_model_with_attention_gets_adam_and_others_do_not() -> None:
    kfc = KFC(transformer(), **AUTO)
    assert (kfc.settings.rule, kfc.settings.inverse) == ("adam", "eigh")
    assert kfc.rule_choice.reason == "the model has attention ('1.self_attn')"
    plain = KFC(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), **AUTO)
    assert (plain.settings.rule, plain.settings.inverse, plain.rule_choice.reason) == ("natural", "cholesky", "")


def test_a_model_that_is_attention_itself_is_reported_without_a_name() -> None:
    assert KFC(nn.MultiheadAttention(8, 2), **AUTO).rule_choice.reason == "the model has attention"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"inverse": "ekfac"}, "inverse='ekfac'"),
        ({"precision": Precision(inverses="bfloat16")}, "precision.inverses='bfloat16'"),
        ({"placement": "mem-opt"}, "placement='mem-opt' needs"),
        ({"damping": 0.1}, "damping is not 'auto'"),
    ],
)
def test_settings_of_the_natural_rule_keep_it(settings: dict[str, Any], expected: str) -> None:
    kfc = KFC(transformer(), **{**AUTO, **settings})
    assert kfc.settings.rule == "natural"
    assert re.search(expected, kfc.rule_choice.reason)
    assert all(getattr(kfc.settings, name) == value for name, value in settings.items())


def test_a_wide_model_keeps_the_natural_rule_unless_the_wide_layers_are_left_out() -> None:
    model = transformer(width=260)
    choice = KFC(model, **AUTO).rule_choice
    assert choice.rule == "natural"
    assert "'1.linear2' has a factor of 521 dimensions" in choice.reason
    assert KFC(model, exclude=["1.linear*"], **AUTO).settings.rule == "adam"
    # A factor that is a diagonal is not decomposed.
    assert KFC(model, max_factor_dim=500, **AUTO).settings.rule == "adam"


@pytest.mark.parametrize("rule", ["natural", "adam"])
def test_a_rule_that_is_named_is_the_rule(rule: str) -> None:
    kfc = KFC(transformer(), rule=rule)
    assert (kfc.settings.rule, kfc.rule_choice.reason) == (rule, "")


class Attentive(Classifier):
    """A classifier whose model calls itself attention."""

    class Attention(nn.Linear):
        pass

    def __init__(self, **options: Any) -> None:
        super().__init__(dense_net(), optimizer=lambda p: SGD(p, lr=0.5, momentum=0.5), **options)
        self.net.append(self.Attention(self.net[-1].out_features, self.net[-1].out_features))


def test_the_callback_reports_its_choice(caplog: pytest.LogCaptureFixture) -> None:
    callback = KFCCallback()
    with caplog.at_level("INFO"):
        fit(Attentive(), kfc=callback, max_steps=2)
    assert callback.kfc.settings.rule == "adam"
    assert re.search(r"rule='auto' chooses 'adam': the model has attention\s+\('net\.\d'\)", caplog.text)
    assert [line for line in caplog.messages if line.startswith("KFCCallback:")] == []
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(Classifier(dense_net(), optimizer=lambda p: SGD(p, lr=0.5, momentum=0.5)), kfc=callback, max_steps=2)
    assert callback.kfc.settings.rule == "natural"
    assert "rule=" not in caplog.text


def test_projections_that_share_a_parameter_step_once() -> None:
    x, y = data(5, 3, 8), data(5, 3, 8, seed=3)
    steps = []
    for options in ({"lr": 1.0}, {"lr": 0.5, "momentum": 0.5}, {"lr": 0.1, "momentum": 0.9}):
        torch.manual_seed(0)
        model = nn.MultiheadAttention(8, 2, batch_first=True).double()
        kfc, optimizer = KFC(model, rule="adam", kl_clip=None), SGD(model.parameters(), **options)
        own = []
        for _ in range(3):
            before = model.in_proj_weight.detach().clone()
            train_step(kfc, optimizer, lambda m=model: F.mse_loss(m(x, x, x, need_weights=False)[0], y))
            own.append(model.in_proj_weight.detach() - before)
        # Each of the 192 directions with a gradient moves by 0.02 at first, times 1.47 by Nesterov's look ahead.
        assert 0.7 < float(own[0].norm()) / (0.02 * (192 * 200 / 17) ** 0.5) < 1.6
        steps.append(own)
    for other in steps[1:]:
        for one, two in zip(steps[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1.0},
        {"lr": 0.5, "momentum": 0.5},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ],
)
def test_whatever_the_momentum_beside_it_adam_s_steps_are_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = data(16, 4), classes(16, count=3)
    kfc, optimizer = KFC(model, rule="adam", kl_clip="auto"), SGD(model.parameters(), **options)
    # By hand: Adam's update by the learning rate of a whole step, 0.02.
    torch.manual_seed(0)
    oracle = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    reference, by_hand = KFC(oracle, rule="adam", kl_clip="auto"), SGD(oracle.parameters(), lr=1.0)
    for _ in range(12):
        for model_, kfc_, optimizer_ in ((model, kfc, optimizer), (oracle, reference, by_hand)):
            before = [p.detach().clone() for p in model_.parameters()]
            train_step(kfc_, optimizer_, lambda m=model_: F.cross_entropy(m(x), y))
            kfc_.review(optimizer=optimizer_)
            assert not all(torch.equal(a, b) for a, b in zip(before, model_.parameters(), strict=True))
    # Adam makes steps of rounding where there is no gradient, so that not every bit is the same.
    for one, other in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rate", "momentum", "length"), [(1.0, 0.0, 1.0), (0.5, 0.5, 1.0), (0.05, 0.9, 0.5)])
def test_a_whole_step_is_adam_s_with_a_fiftieth_of_the_learning_rate_that_momentum_makes_of_it(
    rate: float, momentum: float, length: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = data(9, 4), classes(9, count=3)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    kfc = KFC(model, rule="adam", kl_clip=None)
    train_step(kfc, SGD(model.parameters(), lr=rate, momentum=momentum), lambda: F.cross_entropy(model(x), y))
    layer = kfc.layers["0"]
    assert layer.inverse is not None
    matrix = torch.cat([gradients[0], gradients[1].unsqueeze(1)], 1).unsqueeze(0)
    (update,) = adam_step([matrix], [None], [layer.inverse], [layer.curvature()], [1.0], None).tensors
    weight, bias = (p.detach() - b for p, b in zip(model.parameters(), before, strict=True))
    moved = torch.cat([weight, bias.unsqueeze(1)], 1)
    torch.testing.assert_close(moved, -0.02 * length * update[0])
