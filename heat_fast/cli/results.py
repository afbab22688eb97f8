"""Results that a command is given as a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from heat_fast.cli.common import UsageError
from heat_fast.errors import InputError
from heat_fast.files import is_parquet

if TYPE_CHECKING:
    from heat_fast.result import Attribution


def read_result(path: str, name: str | None = None) -> Attribution:
    """The result of a file; of a file of many, the one whose id is `name` or that is row `name`."""
    if not holds_many(path):
        if name is not None:
            raise UsageError(
                f"--id {name}, but {path!r} holds one result: expected a file of many (.jsonl or "
                ".parquet). Leave --id out."
            )
        from heat_fast.storage import load

        return load(path)
    results = _many(path)
    if name is not None:
        return _chosen(path, results, name)
    first = next(results, None)
    if first is None:
        raise InputError(f"{path!r} holds no results: expected one at least.")
    if next(results, None) is not None:
        raise UsageError(
            f"{path!r} holds several results: expected to know which. Pass --id with the id of "
            "one, or with the number of its row (from 1)."
        )
    return first


def holds_many(path: str) -> bool:
    """Whether a file is one of many results: by its name, unless its first bytes tell otherwise."""
    from heat_fast.storage import kind_of

    kind = kind_of(path) if Path(path).is_file() else None
    if is_parquet(path):
        return kind not in ("json", "safetensors")
    return Path(path).suffix.lower() in (".jsonl", ".ndjson") and kind != "safetensors"


def _many(path: str) -> Iterator[Attribution]:
    if is_parquet(path):
        from heat_fast.tables import read_parquet

        return read_parquet(path)
    from heat_fast.storage import read_jsonl

    return read_jsonl(path)


def _chosen(path: str, results: Iterator[Attribution], name: str) -> Attribution:
    """The result with that id; where there is none, that of the row of that number."""
    named = numbered = None
    last = 0
    for place, result in enumerate(results, start=1):
        number = _row(result, place)
        if result.id == name:
            if named is not None:
                raise UsageError(
                    f"{path!r} has several results {name!r}: expected ids of one result each. "
                    f"Name it by its row instead; the second is row {number}."
                )
            named = result
        last = max(last, number)
        if str(number) == name:
            numbered = result
    if named is not None:
        return named
    if numbered is None:
        raise UsageError(
            f"{path!r} has no result {name!r}: expected an id, or a row from 1 to {last} that did "
            "not fail. Choose another."
        )
    return numbered


def _row(result: Attribution, place: int) -> int:
    """The row that a batch made it of, which may have failed at first and stand last; or its place.

    Rows that failed have no result, so that places alone would name others.
    """
    mark = result.metadata.get("batch")
    number = mark.get("row") if isinstance(mark, Mapping) else None
    return number if isinstance(number, int) else place
