"""Rows of a data set: from a file, or from the Hugging Face hub through `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heat_fast.errors import InputError, MissingPackageError
from heat_fast.rows import read_rows

PathLike = str | os.PathLike[str]


def file_rows(path: PathLike) -> Iterator[Mapping[str, Any]]:
    """Rows of a file: JSON Lines, a JSON array (.json) or Parquet (.parquet)."""
    if Path(path).suffix.lower() == ".json":
        yield from _array(Path(path))
        return
    for row in read_rows(path):
        if row.error is not None:
            raise InputError(
                f"row {row.number} of {str(path)!r} cannot be read: {row.error} Expected a JSON "
                "object per line. Correct or remove the line."
            )
        yield row.fields


def _array(path: Path) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error}. Expected a JSON array of objects. Check the "
            "path; a file of one object per line ends in .jsonl."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{str(path)!r} holds no array of objects: expected one object per row. Convert it to "
            "JSON Lines, one object per line."
        )
    return rows


def hub_rows(name: str, split: str, stream: bool) -> Iterator[Mapping[str, Any]]:
    """Rows of a split of a set on the hub; streamed, only what is read is downloaded."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackageError.of(
            "datasets",
            error,
            f"to download {name}",
            "Install it with pip install datasets, or pass path= with a file that you have.",
        ) from error
    try:
        yield from load_dataset(name, split=split, streaming=stream)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load split {split!r} of {name}: {error}. Expected a connection to the hub (or "
            "a cached copy) and a split that the set has. Check both, or pass path=."
        ) from error
