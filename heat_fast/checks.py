"""Whole numbers and known names among arguments, fields and settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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


def nearest(name: object, known: Iterable[str]) -> str:
    """As `suggest`, where all names have been told already."""
    found = suggest(name, known)
    return "Choose one of them." if found.startswith("Known") else found


def suggest(name: object, known: Iterable[str]) -> str:
    """A sentence naming the known names close to `name`, or all of them where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    return f"Known names: {', '.join(names)}."
