"""Reasons why a module or a parameter is not a layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_kfc.layers import adapter_for
from lightning_kfc.utilities.torch_internals import buffers_of, parameters_of

#: The reason for no curvature of a lazy module before its first input.
UNINITIALISED = "not initialised before the first forward"

#: The reason for no curvature of a complex parameter. All factors are real.
COMPLEX = "complex: there is no curvature for complex values"

#: The reason for no curvature of a parameter without elements.
EMPTY = "empty: it has no elements"


def uninitialised(module: nn.Module) -> bool:
    """Whether a module is lazy and uninitialised."""
    return any(parameter is not None and is_lazy(parameter) for parameter in parameters_of(module).values())


def complex_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's own complex parameters."""
    return [p for p in parameters_of(module).values() if p is not None and p.is_complex()]


def empty_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that have no elements."""
    return [p for p in parameters_of(module).values() if p is not None and not is_lazy(p) and not p.numel()]


def left_out(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str | None:
    """The reason why the user's patterns leave a module out; None if they do not."""
    if include is not None and not _matches(name, include):
        return "not in include"
    if exclude is not None and _matches(name, exclude):
        return "in exclude"
    return None


def refusal(module: nn.Module) -> str | None:
    """The reason why a module has no adapter; None if it has one."""
    kind = adapter_for(module)
    if uninitialised(module):
        return UNINITIALISED
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "it belongs to a re-parametrised weight"
    if kind is None:
        return f"no adapter for {type(module).__name__}"
    if complex_parameters(module):
        return "its module has complex parameters"
    if empty_parameters(module):
        return "its module has parameters without elements"
    if _computes_its_weight(module):
        return "its weight is re-parametrised"
    return kind.refusal(module)


def _computes_its_weight(module: nn.Module) -> bool:
    # Without reading the weight, since each read continues the power iteration of a spectral norm.
    held = module.__dict__.get("weight", buffers_of(module).get("weight"))
    return held is not None or nn.utils.parametrize.is_parametrized(module, "weight")


def why_not(module: nn.Module, holder: nn.Module) -> str:
    """The reason why a parameter of this module, or of a submodule, has no adapter."""
    return refusal(module) or refusal(holder) or f"not a weight of {type(module).__name__}'s layers"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns_match(option: str, patterns: Sequence[str] | None, owners: Mapping[str, nn.Module]) -> None:
    """Require that each pattern of an option matches a module.

    Args:
        option: The option's name.
        patterns: Its value.
        owners: The modules with parameters of their own, by name.

    Raises:
        ValueError: If one matches nothing.
    """
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in owners):
            raise ValueError(
                f"{option} pattern {pattern!r} matches no module that has parameters. "
                f"The modules are: {', '.join(owners) or 'none'}."
            )


def raise_no_layer(
    owners: Mapping[str, nn.Module],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    held: Mapping[str, str],
) -> NoReturn:
    """Raise the error that no layer is left, with the reason for each module.

    Args:
        owners: The modules with parameters of their own, by name.
        include: The user's patterns.
        exclude: The user's patterns.
        held: The module that uses the parameters of another one, by that one's name.

    Raises:
        ValueError: Always.
    """
    lines = [
        f"  {name} ({type(module).__name__}): "
        f"{left_out(name, include, exclude) or refusal(owners[held.get(name, name)]) or 'frozen, or shared'}"
        for name, module in owners.items()
    ]
    raise ValueError(
        "KFC found no layer to precondition. It needs a trainable parameter that `include` and `exclude` do not leave "
        "out. The modules with parameters are:\n" + ("\n".join(lines) or "  none")
    )
