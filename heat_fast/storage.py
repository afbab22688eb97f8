"""Results in files: safetensors or JSON for one, JSON Lines for many.

A safetensors file holds the arrays as tensors and everything else as JSON in its header; JSON holds
all of it, as `heat_fast/schema/attribution-<version>.json` describes. No pickle is written or read.
Every reader takes all earlier versions: what these lack is filled in as it was then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import torch
from torch import Tensor

from heat_fast.errors import InputError, NumericalError
from heat_fast.files import replacing
from heat_fast.metadata import plain
from heat_fast.result import ARRAYS, STDERR, Attribution

__all__ = [
    "SCHEMA_VERSION",
    "from_dict",
    "header_of",
    "json_schema",
    "load",
    "read_jsonl",
    "to_bytes",
    "to_dict",
    "to_line",
    "write_jsonl",
]

#: Version of the file's layout and of :meth:`Attribution.to_dict`; a reader refuses newer ones.
SCHEMA_VERSION: Final = 2
_FORMAT: Final = "heat_fast.attribution"
_HEADER_KEY: Final = "heat_fast"


def json_schema(version: int = SCHEMA_VERSION) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of :meth:`Attribution.to_dict`, of this or an older version.

    Raises InputError for a version that there is none of.

    >>> json_schema()["properties"]["schema_version"]["const"]
    2
    """
    if version not in range(1, SCHEMA_VERSION + 1):
        raise InputError(f"schema version {version!r}: expected 1 to {SCHEMA_VERSION}.")
    text = resources.files("heat_fast") / "schema" / f"attribution-{version}.json"
    schema: dict[str, Any] = json.loads(text.read_text(encoding="utf-8"))
    return schema


# --- one result -----------------------------------------------------------------------------------


def to_bytes(result: Attribution) -> bytes:
    """A result as the contents of one safetensors file."""
    from safetensors.torch import save

    arrays = {name: getattr(result, name) for name in result.array_names()}
    return save(arrays, metadata={_HEADER_KEY: json.dumps(header_of(result), allow_nan=False)})


def load(path: str | os.PathLike[str]) -> Attribution:
    """Read a result that :meth:`Attribution.save` wrote, or one written as JSON.

    Raises InputError where the file is missing, damaged, of another kind, or written by a newer
    version of this package.
    """
    try:
        place = Path(path)
    except TypeError as error:
        raise InputError(
            f"path is {type(path).__name__}: expected the name of a file. Pass a str or a Path."
        ) from error
    if not place.is_file():
        raise InputError(
            f"there is no file {str(place)!r}: expected a result written by save(). Check the path."
        )
    kind = kind_of(place)
    if kind == "parquet":
        raise InputError(
            f"{str(place)!r} is a Parquet file, which holds many results: expected one result. "
            "Read it with heat_fast.read_parquet()."
        )
    if kind == "json":
        return _parse(place.read_bytes(), repr(str(place)))
    return _load_safetensors(place)


def kind_of(path: str | os.PathLike[str]) -> Literal["json", "safetensors", "parquet"] | None:
    """What a file is by its first bytes, whatever its name; None for anything else.

    A safetensors file begins with the length of its header, a multiple of 8, which "{" is not.
    """
    with Path(path).open("rb") as file:
        begin = file.read(9)
    if begin.startswith(b"{"):
        return "json"
    if begin.startswith(b"PAR1"):
        return "parquet"
    return "safetensors" if begin[8:] == b"{" else None


def _load_safetensors(place: Path) -> Attribution:
    from safetensors import SafetensorError, safe_open

    where = repr(str(place))
    try:
        with safe_open(place, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{where} cannot be read as a safetensors file ({error}): expected a result "
            "written by save(). The file is damaged or of another kind; save the result again."
        ) from error
    if _HEADER_KEY not in metadata:
        raise InputError(
            f"{where} is a safetensors file without an attribution in it: expected a result "
            "written by save(). Check the path."
        )
    try:
        header = json.loads(metadata[_HEADER_KEY])
    except ValueError as error:
        _damaged(where, "its header is not JSON", error)
    return build(header, arrays, where)


# --- JSON -----------------------------------------------------------------------------------------


def to_dict(result: Attribution) -> dict[str, Any]:
    """A result as strict JSON values; see :meth:`Attribution.to_dict`."""
    arrays = {name: getattr(result, name).tolist() for name in result.array_names()}
    return {**header_of(result), "scores": result.scores.tolist(), **arrays}


def from_dict(data: Mapping[str, Any]) -> Attribution:
    """The inverse of :meth:`Attribution.to_dict`, of this version or an older one.

    Raises InputError where `data` is no result, incomplete or of a newer version.
    """
    return _from_dict(data, "the mapping")


def _from_dict(data: Any, where: str) -> Attribution:
    _check_header(data, where)
    names = [name for name in (*ARRAYS, STDERR) if name in data]
    try:
        arrays = {
            name: torch.tensor(data[name], dtype=torch.float32, device="cpu") for name in names
        }
    except (TypeError, ValueError, RuntimeError) as error:
        _damaged(where, str(error), error)
    return build(data, arrays, where)


def to_line(result: Attribution) -> str:
    """A result as one line of JSON, with its line break."""
    return json.dumps(to_dict(result), allow_nan=False) + "\n"


def write_jsonl(results: Iterable[Attribution], path: str | os.PathLike[str]) -> None:
    """Write results (or a single one) as JSON Lines, as they come; a file is replaced at the end.

    Raises OutputError where the file cannot be written, InputError for anything but results.

    >>> write_jsonl([], os.devnull)
    """
    if isinstance(results, Attribution):
        results = [results]
    with replacing(path) as file:
        for result in results:
            check_result(result)
            file.write(to_line(result).encode("ascii"))


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[Attribution]:
    """The results of a JSON Lines file, read one after the other; empty lines are passed over.

    Raises InputError, naming the line, where the file is missing or a line is no result.
    """
    place = Path(path)
    if not place.is_file():
        raise InputError(
            f"there is no file {str(place)!r}: expected one written by write_jsonl(). Check the "
            "path."
        )
    return _lines(place)


def _lines(place: Path) -> Iterator[Attribution]:
    with place.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, f"line {number} of {str(place)!r}")


def _parse(text: bytes, where: str) -> Attribution:
    try:
        data = json.loads(text)
    except ValueError as error:
        _damaged(where, f"it is not JSON ({error})", error)
    return _from_dict(data, where)


# --- what they share ------------------------------------------------------------------------------


def check_result(value: Any) -> None:
    """Raise InputError for anything but a result."""
    if not isinstance(value, Attribution):
        raise InputError(
            f"cannot write {type(value).__name__}: expected the results of attribute(). Pass a "
            "list of them."
        )


def header_of(result: Attribution) -> dict[str, Any]:
    """All of a result but its arrays, as JSON values; :func:`build` is the inverse."""
    skipped, roles, offsets = result.information_skipped, result.roles, result.offsets
    return {
        "format": _FORMAT,
        "schema_version": SCHEMA_VERSION,
        "id": result.id,
        "roles": None if roles is None else list(roles),
        "prompt_text": result.prompt_text,
        "token_ids": list(result.token_ids),
        "tokens": list(result.tokens),
        "offsets": None if offsets is None else [list(pair) for pair in offsets],
        "special": list(result.special),
        "target_ids": list(result.target_ids),
        "target_tokens": list(result.target_tokens),
        "information_skipped": None if skipped is None else list(skipped),
        "metadata": plain(result.metadata),
    }


def build(header: Any, arrays: Mapping[str, Tensor], where: str) -> Attribution:
    """A result from its header and arrays, of any version; `where` is named in errors."""
    _check_header(header, where)
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        _damaged(where, f"it has no {', '.join(missing)}")
    skipped, roles = header.get("information_skipped"), header.get("roles")
    try:
        return Attribution(
            token_ids=_list_of(header, "token_ids", int),
            tokens=_list_of(header, "tokens", str),
            offsets=header["offsets"],
            prompt_text=header["prompt_text"],
            special=_list_of(header, "special", bool),
            target_ids=_list_of(header, "target_ids", int),
            target_tokens=_list_of(header, "target_tokens", str),
            metadata=header["metadata"],
            curvature_stderr=arrays.get(STDERR),
            information_skipped=(
                None if skipped is None else _list_of(header, "information_skipped", bool)
            ),
            # Since version 2.
            roles=None if roles is None else _list_of(header, "roles", str, type(None)),
            id=header.get("id"),
            **{name: arrays[name] for name in ARRAYS},
        )
    except KeyError as error:
        _damaged(where, f"its header has no {error}", error)
    except (TypeError, ValueError, NumericalError) as error:
        _damaged(where, str(error), error)


def _check_header(header: Any, where: str) -> None:
    if not isinstance(header, Mapping) or header.get("format") != _FORMAT:
        _damaged(where, "its header does not describe an attribution")
    version = header.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        _damaged(where, f"its schema version is {version!r}")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{where} has schema version {version}: expected at most {SCHEMA_VERSION}. It "
            "was written by a newer heat_fast; upgrade to read it."
        )


def _list_of(header: Mapping[str, Any], name: str, *kinds: type) -> tuple[Any, ...]:
    values = header[name]
    if not isinstance(values, list) or any(type(value) not in kinds for value in values):
        raise InputError(f"{name} is not a list of {kinds[0].__name__}")
    return tuple(values)


def _damaged(where: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise InputError(
        f"{where} is damaged: {why}. Expected a result as heat_fast writes it; write it again."
    ) from cause
