"""Results as tables: a pandas data frame of one, a Parquet file of many.

A Parquet file has a row per result and a column per field of `Attribution.to_dict`; arrays
`[T, N]` are flat lists, target after target. Columns are compressed by what they hold: floats byte
plane by byte plane (their signs and exponents repeat, the rest hardly does), tokens by a
dictionary, character positions by their differences.

pandas and pyarrow are asked for only here (``pip install 'heat-fast[files]'``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from heat_fast.checks import suggest
from heat_fast.errors import InputError, MissingPackageError
from heat_fast.files import replacing
from heat_fast.result import ARRAYS, COMPONENTS, STDERR, Attribution
from heat_fast.storage import build, check_result, header_of

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["read_parquet", "to_dataframe", "write_parquet"]

_FLOATS: Final = (*ARRAYS, STDERR)
_INTEGERS: Final = ("token_ids", "target_ids")
_POSITIONS: Final = ("starts", "ends")
_TEXTS: Final = ("tokens", "target_tokens", "roles")
_FLAGS: Final = ("special", "information_skipped")
#: Results of one row group: enough to share dictionaries, few enough to hold in memory.
_GROUP: Final = 128


def missing(package: str, error: ImportError) -> MissingPackageError:
    """The error of a command that needs one of the optional packages."""
    return MissingPackageError.of(
        package,
        error,
        "for tables and Parquet files",
        "Install it with pip install 'heat-fast[files]', or write JSON Lines.",
    )


# --- pandas ---------------------------------------------------------------------------------------


def to_dataframe(result: Attribution, *, per_target: bool = False) -> DataFrame:
    """One row per prompt token, in order: what it is, its score and its components.

    Components are aggregated over targets like the scores, and curvature_stderr (an upper bound,
    where the probes are shared) too; with `per_target` there is a row for every target and token
    instead, target after target, with the columns `target_index` and `target` in front. Positions
    are missing (`<NA>`) where the prompt was given as ids, and components that were not measured
    (:attr:`Attribution.measured`) are NaN.

    Raises MissingPackageError where pandas is not installed.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, [5, 6, 7], probes=1)
    >>> list(result.to_dataframe().columns[:4])
    ['index', 'token', 'token_id', 'start']
    """
    try:
        import pandas
    except ImportError as error:
        raise missing("pandas", error) from error
    repeats = len(result.target_ids) if per_target else 1
    offsets = result.offsets or ((None, None),) * len(result)
    columns: dict[str, Any] = {}
    if per_target:
        count = len(result)
        columns["target_index"] = [t for t in range(repeats) for _ in range(count)]
        columns["target"] = [token for token in result.target_tokens for _ in range(count)]
    columns |= {
        "index": [*range(len(result))] * repeats,
        "token": [*result.tokens] * repeats,
        "token_id": [*result.token_ids] * repeats,
        "start": pandas.array([start for start, _ in offsets] * repeats, dtype="Int64"),
        "end": pandas.array([end for _, end in offsets] * repeats, dtype="Int64"),
        "special": [*result.special] * repeats,
        "template": [*result.template] * repeats,
        "role": [*(result.roles or (None,) * len(result))] * repeats,
    }
    names = ("target_scores", *(name for name in COMPONENTS if name != "target_scores"))
    for name in (*names, *result.array_names()[len(ARRAYS) :]):
        values = getattr(result, name) if per_target else result.aggregated(name)
        if ("curvature" if name == STDERR else name) not in result.measured:
            values = torch.full_like(values, torch.nan)  # a 0 would read as a measurement
        columns["score" if name == "target_scores" else name] = values.flatten().numpy()
    if result.information_skipped is not None:
        columns["information_skipped"] = [*result.information_skipped] * repeats
    return pandas.DataFrame(columns)


# --- Parquet --------------------------------------------------------------------------------------


def write_parquet(
    results: Iterable[Attribution],
    path: str | os.PathLike[str],
    *,
    arrays: Sequence[str] | None = None,
) -> None:
    """Write results as one Parquet file, a row each, as they come; a file is replaced at the end.

    arrays: which of the arrays to keep, ``("gate", "curvature", "information")`` say, for a smaller
    file to analyse; all by default, and only then can :func:`read_parquet` give the results back.
    `target_log_probs` is always kept.

    Raises OutputError where the file cannot be written, InputError for an unknown array and for
    text that UTF-8 cannot hold (lone surrogates), MissingPackageError where pyarrow is not
    installed.
    """
    kept = _FLOATS if arrays is None else _chosen(arrays)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing("pyarrow", error) from error
    schema = _schema(pyarrow, kept)
    rows = iter(results)
    with (
        replacing(path) as file,
        parquet.ParquetWriter(
            file,
            schema,
            compression="zstd",
            compression_level=9,
            use_dictionary=["id", *_paths(_INTEGERS), *_paths(_TEXTS)],
            column_encoding={
                **dict.fromkeys(_paths(kept), "BYTE_STREAM_SPLIT"),
                **dict.fromkeys(_paths(_POSITIONS), "DELTA_BINARY_PACKED"),
            },
            write_statistics=False,
        ) as writer,
    ):
        while group := list(islice(rows, _GROUP)):
            try:
                table = pyarrow.Table.from_pylist([_row(each, kept) for each in group], schema)
            except UnicodeEncodeError as error:
                raise InputError(
                    f"a result holds text that is not valid Unicode ({error.reason}): expected no "
                    "lone surrogates, which Parquet cannot hold. Write JSON Lines instead."
                ) from error
            writer.write_table(table)


def read_parquet(path: str | os.PathLike[str]) -> Iterator[Attribution]:
    """The results of a Parquet file that :func:`write_parquet` wrote, one after the other.

    Raises InputError where the file is missing, damaged, of another kind or keeps some of the
    arrays only; MissingPackageError where pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing("pyarrow", error) from error
    place = Path(path)
    if not place.is_file():
        raise InputError(
            f"there is no file {str(place)!r}: expected one written by write_parquet(). Check the "
            "path."
        )
    try:
        file = parquet.ParquetFile(place)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{str(place)!r} cannot be read as a Parquet file ({reason}): expected one written by "
            "write_parquet(). The file is damaged or of another kind."
        ) from error
    names = set(file.schema_arrow.names)
    if "format" not in names:
        raise InputError(
            f"{str(place)!r} holds a table of something else: expected results, as write_parquet() "
            "writes them. Check the path."
        )
    lacking = [name for name in ARRAYS if name not in names]
    if lacking:
        raise InputError(
            f"{str(place)!r} keeps some of the arrays only and lacks {', '.join(lacking)}: "
            "expected all of them. Write it without arrays=, or read it with pandas.read_parquet()."
        )
    return _results(file, str(place))


def _results(file: Any, place: str) -> Iterator[Attribution]:
    number = 0
    for batch in file.iter_batches(batch_size=16):
        for row in batch.to_pylist():
            yield _result(row, f"row {number} of {place!r}")
            number += 1


def _chosen(arrays: Sequence[str]) -> tuple[str, ...]:
    if isinstance(arrays, str) or not isinstance(arrays, Iterable):
        raise InputError(
            f"arrays={arrays!r}: expected a list of names. Write arrays=('gate', 'curvature'), say."
        )
    known = [name for name in _FLOATS if name != "target_log_probs"]
    for name in arrays:
        if name not in known:
            raise InputError(
                f"unknown array {name!r}: expected some of the [targets, tokens] arrays. "
                + suggest(name, known)
            )
    return (*arrays, "target_log_probs")


def _paths(names: Iterable[str]) -> list[str]:
    """The columns of the values of list columns."""
    return [f"{name}.list.element" for name in names]


def _schema(pyarrow: Any, kept: Sequence[str]) -> Any:
    def lists(names: Sequence[str], kind: Any) -> list[tuple[str, Any]]:
        return [(name, pyarrow.list_(kind)) for name in names]

    return pyarrow.schema(
        [
            ("format", pyarrow.string()),
            ("schema_version", pyarrow.int32()),
            ("id", pyarrow.string()),
            ("prompt_text", pyarrow.string()),
            *lists((*_INTEGERS, *_POSITIONS), pyarrow.int32()),
            *lists(_TEXTS, pyarrow.string()),
            *lists(_FLAGS, pyarrow.bool_()),
            *lists(kept, pyarrow.float32()),
            ("metadata", pyarrow.string()),
        ]
    )


def _row(result: Attribution, kept: Sequence[str]) -> dict[str, Any]:
    check_result(result)
    row = header_of(result)
    offsets = row.pop("offsets")
    row["starts"] = None if offsets is None else [start for start, _ in offsets]
    row["ends"] = None if offsets is None else [end for _, end in offsets]
    row["metadata"] = json.dumps(row["metadata"], allow_nan=False)
    held = result.array_names()
    return row | {
        name: getattr(result, name).flatten().numpy() if name in held else None for name in kept
    }


def _result(row: dict[str, Any], where: str) -> Attribution:
    starts, ends = row.pop("starts"), row.pop("ends")
    pairs = zip(starts or (), ends or (), strict=False)  # the result checks their number
    row["offsets"] = None if starts is None else [list(pair) for pair in pairs]
    shape = len(row["target_ids"]), len(row["token_ids"])
    arrays = {}
    for name in _FLOATS:
        values = row.pop(name, None)
        if values is not None:
            array = torch.tensor(values, dtype=torch.float32, device="cpu")
            whole = name != "target_log_probs" and array.numel() == shape[0] * shape[1]
            arrays[name] = array.view(shape) if whole else array
    try:
        row["metadata"] = json.loads(row["metadata"])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where} is damaged: its metadata is not JSON. Expected a result as heat_fast writes "
            "it; write it again."
        ) from error
    return build(row, arrays, where)
