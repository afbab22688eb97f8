"""The settings of the baselines: dataclass fields with a default and a check of their own."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from heat_fast.checks import is_whole
from heat_fast.errors import ConfigError

#: `check(name, value)` returns the value to keep, or raises `ConfigError`.
Check = Callable[[str, Any], Any]


def setting(default: Any, check: Check) -> Any:
    """A field of a baseline, checked when the baseline is made."""
    return dataclasses.field(default=default, metadata={"check": check})


def check_settings(owner: Any) -> None:
    """Put the checked value of every :func:`setting` of a frozen dataclass in its place."""
    for field in dataclasses.fields(owner):
        check: Check | None = field.metadata.get("check")
        if check is not None:
            object.__setattr__(owner, field.name, check(field.name, getattr(owner, field.name)))


def choice(*known: str) -> Check:
    """One of the values that are known."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ConfigError(
                f"{name}={value!r}: expected one of {', '.join(map(repr, known))}. Choose one."
            )
        return value

    return check


def whole(minimum: int = 1, maximum: int | None = None) -> Check:
    """A whole number, NumPy's too, of at least `minimum`."""
    upper = "" if maximum is None else f" and at most {maximum}"

    def check(name: str, value: Any) -> int:
        if not is_whole(value) or value < minimum or (maximum is not None and value > maximum):
            raise ConfigError(
                f"{name}={value!r}: expected a whole number of at least {minimum}{upper}. Pass one."
            )
        return int(value)

    return check


def positive(maximum: float = math.inf) -> Check:
    """A finite number, NumPy's too, above 0 and not above `maximum`."""
    upper = "" if math.isinf(maximum) else f" and at most {maximum:g}"

    def check(name: str, value: Any) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not 0 < value <= maximum or math.isinf(value):
            raise ConfigError(f"{name}={value!r}: expected a number above 0{upper}. Pass one.")
        return float(value)

    return check


def optional(check: Check) -> Check:
    """None, or what the other check allows."""
    return lambda name, value: None if value is None else check(name, value)
