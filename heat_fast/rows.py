"""The rows of a JSON Lines or Parquet file, one at a time, each with a digest of what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from heat_fast.errors import InputError
from heat_fast.files import check_rows_name, is_parquet
from heat_fast.tables import missing

__all__ = ["Row", "count_rows", "digest_of", "read_rows"]


@dataclass(frozen=True)
class Row:
    """One row of the input: its number (from 1), its fields, and a digest of what it says.

    `error`: why it cannot be read, in place of the fields.
    """

    number: int
    digest: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None


def count_rows(path: str | os.PathLike[str]) -> int:
    """Rows of an input file, without reading what they say."""
    if is_parquet(path):
        return int(_open_parquet(path).metadata.num_rows)
    with _open_lines(path) as file:
        return sum(bool(line.strip()) for line in file)


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a JSON Lines or Parquet file, one at a time.

    Raises InputError where the file cannot be read or is of another kind by its name; a line that
    is no JSON object is a row with an `error`.
    """
    return _parquet_rows(_open_parquet(path)) if is_parquet(path) else _json_rows(path)


def digest_of(data: bytes) -> str:
    """16 hexadecimal digits that tell some data from any other.

    Example:
        >>> digest_of(b"the red ball") == digest_of(b"the red bell")
        False
    """
    return hashlib.sha256(data).hexdigest()[:16]


@contextlib.contextmanager
def _open_lines(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            # JSON Lines are called .json as well as JSON.
            if not (Path(path).suffix.lower() == ".json" and _begins_with_row(file)):
                check_rows_name(path, "Convert it first.")
            yield file
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error.strerror}. Expected a file of JSON Lines or, by "
            "the ending .parquet, a Parquet file. Check the path."
        ) from error


def _begins_with_row(file: BinaryIO) -> bool:
    """Whether there is an object on the first line that is not empty, as in JSON Lines."""
    if not file.seekable():  # a pipe cannot be read twice
        return True
    first = next((line for line in file if line.strip()), b"{}")
    file.seek(0)
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    with _open_lines(path) as file:
        number = 0
        for line in file:
            if not line.strip():
                continue
            number += 1
            digest = digest_of(line.strip())
            try:
                fields = json.loads(line)
            except ValueError as error:
                yield Row(number, digest, error=f"the line is not JSON: {error}")
                continue
            if not isinstance(fields, dict):
                kind = type(fields).__name__
                yield Row(number, digest, error=f"the line is a {kind}: expected an object.")
                continue
            broken = next((name for name in fields if not _is_unicode({name: fields[name]})), None)
            if broken is None:
                yield Row(number, digest, fields)
            else:
                reason = (
                    f"{broken!r} is not valid Unicode: expected no lone surrogates (half a "
                    "character, as \\ud83d). Mend the row."
                )
                yield Row(number, digest, error=reason)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _open_parquet(path: str | os.PathLike[str]) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing("pyarrow", error) from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise InputError(
            f"cannot read {str(path)!r} as a Parquet file ({str(error).splitlines()[0]}): expected "
            "a whole one, with a row for each example. Check the path."
        ) from error


def _parquet_rows(file: Any) -> Iterator[Row]:
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for fields in batch.to_pylist():
            number += 1
            yield Row(number, digest_of(json.dumps(fields, default=str).encode()), fields)
