"""Metadata that JSON can hold and nobody can change."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from heat_fast.errors import InputError


def plain(metadata: Any) -> dict[str, Any]:
    """A deep copy as plain JSON values; InputError where JSON cannot hold it."""
    try:
        copied = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the metadata cannot be written as JSON ({error}): expected strings, finite numbers, "
            "lists and dicts."
        ) from error
    if not isinstance(copied, dict):
        raise InputError(f"the metadata is {type(metadata).__name__}: expected a dict.")
    return copied


def frozen(metadata: Any) -> Any:
    """JSON values with their dicts read-only and their lists as tuples.

    >>> frozen({"a": [1, 2]})
    {'a': (1, 2)}
    """
    if isinstance(metadata, dict):
        return _ReadOnlyDict({key: frozen(item) for key, item in metadata.items()})
    if isinstance(metadata, list):
        return tuple(frozen(item) for item in metadata)
    return metadata


class _ReadOnlyDict(dict[str, Any]):
    """A dict that json, copy and pickle understand and nobody can change."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("the metadata of a result is read-only; copy it with dict(...) first")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return (_ReadOnlyDict, (dict(self),))

    def __deepcopy__(self, memo: Any) -> _ReadOnlyDict:
        return self
