"""Checks of the user's settings, with errors that name the setting, the value and the way out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

#: The largest integer in torch.
LARGEST = 2**63 - 1


def plain_number(value: Any) -> Any:
    """A number of another package, or a fraction, as Python's own; other values unchanged."""
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_finite(value: Any) -> bool:
    """Whether a real number is finite as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_positive(name: str, value: Any, *, otherwise: str = "") -> None:
    """Require a positive, finite number; ``otherwise`` names what else is allowed, after "a number"."""
    _check_number(name, value, otherwise)
    if not (value > 0 and is_finite(value)):
        raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_positive_or_auto(name: str, value: Any) -> None:
    """Require a positive, finite number, or ``"auto"``."""
    if not isinstance(value, str) or value != "auto":
        check_positive(name, value, otherwise=" or 'auto'")


def check_fraction(name: str, value: Any, *, otherwise: str = "") -> None:
    """Require a number of at least 0 and below 1; ``otherwise`` names what else is allowed, after "a number"."""
    _check_number(name, value, otherwise)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}.")


def check_integer(name: str, value: Any, *, minimum: int | None = None) -> None:
    """Require a whole number, of at least ``minimum`` if given."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}.")
    if int(value) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, which is 2^63 - 1; got more.")


def check_period(name: str, value: Any) -> None:
    """Require a whole number of steps, at least 1, or ``"auto"``."""
    if not isinstance(value, str):
        check_integer(name, value, minimum=1)
    elif value != "auto":
        raise TypeError(f"{name} must be a whole number or 'auto', got {value!r} of type {type(value).__name__}.")


def check_flag(name: str, value: Any) -> None:
    """Require true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}.")


def check_instance(name: str, value: Any, kind: type) -> None:
    """Require an instance of a class."""
    if not isinstance(value, kind):
        made = f"{name}={kind.__name__}(...)"
        raise TypeError(f"{name} must be given as {made}, got {value!r} of type {type(value).__name__}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Require one of the named choices."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_module_name(name: str, value: Any) -> None:
    """Require a string; the name is checked later, with the model."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be the name of a module, got {value!r} of type {type(value).__name__}.")


def check_folder(name: str, value: Any) -> str:
    """The path of a folder, which need not exist, as a string."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise TypeError(f"{name} must be the path of a folder, got {value!r} of type {type(value).__name__}.")
    return str(os.fspath(value))


def check_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """Glob patterns as a tuple; a single string is one pattern."""
    if value is None:
        return None
    try:
        patterns = (value,) if isinstance(value, str) else tuple(value)
    except TypeError:  # a zero-dimensional array has iter() too
        patterns = (value,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{name} takes glob patterns over module names, such as 'encoder.*'; "
                f"got {pattern!r} of type {type(pattern).__name__}."
            )
    return patterns


def _check_number(name: str, value: Any, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{otherwise}, got {value!r} of type {type(value).__name__}.")
