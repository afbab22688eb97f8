"""What a setting may hold: fields of frozen dataclasses, each with a check made to measure.

A check receives the field's name and the value given, and returns the value to store, or raises
`ConfigError`. `also` is what a wrapper adds to the words of the check within.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Final, get_args

from heat_fast.checks import is_whole, nearest
from heat_fast.errors import ConfigError

Check = Callable[[str, Any], Any]


def setting(default: Any, check: Check) -> Any:
    """A field of a dataclass that calls `check_settings` when it is made."""
    return dataclasses.field(default=default, metadata={"check": check})


def check_settings(owner: Any) -> None:
    """Check the fields of a frozen dataclass that have a check, and store what it returns."""
    for field in dataclasses.fields(owner):
        check: Check | None = field.metadata.get("check")
        if check is not None:
            object.__setattr__(owner, field.name, check(field.name, getattr(owner, field.name)))


def _error(name: str, value: Any, expected: str, do: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} is not valid: expected {expected}. {do}")


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def one_of(literal: Any, also: str = "") -> Check:
    """One of the strings of a `Literal`."""
    choices = get_args(literal)

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            expected = "one of " + ", ".join(repr(choice) for choice in choices) + also
            raise _error(name, value, expected, nearest(value, choices))
        return value

    return check


def _real(holds: Callable[[float], bool], expected: str, do: str) -> Check:
    """A real number of which `holds` is true, as a float."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _error(name, value, expected, f"Pass a float, not {_kind(value)}.")
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not holds(found):
            raise _error(name, value, expected, do)
        return found

    return check


def number(*, minimum: float) -> Check:
    """A finite number of at least `minimum`, as a float."""
    return _real(
        lambda found: minimum <= found < math.inf,
        f"a finite number, at least {minimum:g}",
        f"Choose a value of at least {minimum:g}.",
    )


def fraction(example: float) -> Check:
    """A number between 0 and 1, neither included; `example` is one to advise."""
    return _real(
        lambda found: 0 < found < 1, "a number between 0 and 1", f"Choose, say, {example}."
    )


def positive(example: float, maximum: float = math.inf) -> Check:
    """A finite number above 0 and at most `maximum`; `example` is one to advise."""
    upper = "" if math.isinf(maximum) else f" and at most {maximum:g}"
    return _real(
        lambda found: 0 < found <= maximum and found < math.inf,
        f"a finite number above 0{upper}",
        f"Choose, say, {example}.",
    )


#: A number from 0 to below 1.
below_one: Final = _real(
    lambda found: 0 <= found < 1, "a number of at least 0 and below 1", "Choose, say, 0.5."
)


def integer(*, minimum: int, maximum: int | None = None, also: str = "") -> Check:
    """A whole number from `minimum` to `maximum`, as an int."""
    upper = "" if maximum is None else f" and at most {maximum}"

    def check(name: str, value: Any) -> int:
        expected = f"an integer, at least {minimum}{upper}{also}"
        if not is_whole(value):
            raise _error(name, value, expected, f"Pass an int, not {_kind(value)}.")
        found = int(value)
        if found < minimum or (maximum is not None and found > maximum):
            raise _error(name, value, expected, f"Choose a value of at least {minimum}{upper}.")
        return found

    return check


# What the two wrappers below add to what their checks expect.
OR_NONE: Final = ", or None"
OR_AUTO: Final = ", or 'auto'"


def optional(check: Check) -> Check:
    """None, or what `check` takes."""

    def optional_check(name: str, value: Any) -> Any:
        return None if value is None else check(name, value)

    return optional_check


def automatic(check: Check) -> Check:
    """The word "auto", or what `check` takes."""

    def automatic_check(name: str, value: Any) -> Any:
        return "auto" if isinstance(value, str) and value == "auto" else check(name, value)

    return automatic_check
