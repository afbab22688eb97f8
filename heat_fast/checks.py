"""Whole numbers among arguments, fields and settings."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from heat_fast.errors import InputError


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, NumPy's too.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`, or an `InputError`."""
    if not is_whole(value) or value < least:
        raise InputError(
            f"{name}={value!r}: expected a whole number of at least {least}. Pass one."
        )
    return int(value)
