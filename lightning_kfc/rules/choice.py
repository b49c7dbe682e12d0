"""Choose the rule for ``rule="auto"``, by the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed import process_group as distributed
from lightning_kfc.rules.adam import AdamRule
from lightning_kfc.rules.base import Rule
from lightning_kfc.rules.natural import HIGHEST_MOMENTUM, NaturalRule
from lightning_kfc.settings import Settings

#: The rules, by the values of the option.
RULE_TYPES: dict[str, type[Rule[Any]]] = {"natural": NaturalRule, "adam": AdamRule}

#: The widest factor for the rule "adam", which decomposes every factor, at far more cost than an inverse. On the deep
#: autoencoder with layers of width 1,000 it lost time; the transformers on which it gained had factors of up to 257.
WIDEST = 512


@dataclass(frozen=True)
class RuleChoice:
    """The chosen rule.

    Attributes:
        rule: ``"natural"`` or ``"adam"``.
        reason: The reason for the choice; empty if the user chose the rule, or the model has no attention.
    """

    rule: str
    reason: str = ""


def choose_rule(model: nn.Module, layers: Mapping[str, Layer], settings: Settings) -> RuleChoice:
    """Choose the rule of a model.

    "auto" becomes "adam" if the model has attention and no wide factors, else "natural".

    Attention is recognised by the names of modules' classes, since there are too many implementations to list.

    Args:
        model: The model.
        layers: Its preconditioned layers.
        settings: The settings.
    """
    if settings.rule != "auto":
        return RuleChoice(settings.rule)
    attention = next((name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()), None)
    if attention is None:
        return RuleChoice("natural")
    where = f"the model has attention ({attention!r})" if attention else "the model has attention"
    against = _against_adam(layers, settings)
    if against:
        return RuleChoice("natural", f"{where}, but {against}")
    return RuleChoice("adam", where)


def make_rule(settings: Settings) -> Rule[Any]:
    """The rule of settings."""
    return NaturalRule(momentum_limit(settings)) if settings.rule == "natural" else RULE_TYPES[settings.rule]()


def momentum_limit(settings: Settings) -> float | None:
    """The limit of SGD's momentum; None for no limit, beside a bound of the user's own."""
    return HIGHEST_MOMENTUM if settings.rule == "natural" and settings.kl_clip == "auto" else None


def with_rule(settings: Settings, choice: RuleChoice) -> Settings:
    """The settings, checked, with the chosen rule."""
    return settings if settings.rule == choice.rule else replace(settings, rule=choice.rule)


def _against_adam(layers: Mapping[str, Layer], settings: Settings) -> str:
    """The reason not to use the rule "adam"; empty without one."""
    if settings.inverse == "ekfac" or settings.precision.inverses != "full":
        return "inverse='ekfac' and precision.inverses='bfloat16' need the rule 'natural'"
    if settings.placement not in ("auto", "comm-opt", 1):
        return f"placement={settings.placement!r} needs the rule 'natural'"
    if settings.damping != "auto":
        return "damping is not 'auto', and only the rule 'natural' uses it"
    parameters = [parameter for layer in layers.values() for parameter in layer.adapter.parameters().values()]
    if any(map(distributed.is_sharded, parameters)):
        return "its parameters are sharded"
    widths = {
        name: max((shape[-1] for shape in layer.adapter.factor_shapes().values() if len(shape) == 3), default=0)
        for name, layer in layers.items()
    }
    widest = max(widths, key=lambda name: widths[name], default=None)
    if widest is not None and widths[widest] > WIDEST:
        return f"{widest!r} has a factor of {widths[widest]:,} dimensions, which are expensive with the rule 'adam'"
    return ""
