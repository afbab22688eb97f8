"""Many prompts from a file, their results into another; stopped anywhere, it goes on from there.

Rows are attributed in order, and each appends one whole line before the next begins: its result to
the output, or the reason for which it failed to the side file. Both lines name the row and a digest
of it, so that a second run knows what was done and notices an input that has changed. A line that
was cut off is taken back, and so is the reason of a row that is tried again: one that was not the
row's own fault, or that was found under other settings. Parquet cannot be appended to: there the
lines go to a journal beside the output, which becomes the output at the end.

A row is a mapping with `prompt` (text or ids) or `messages` (a chat, and `chat_template_kwargs`
with it where its template takes any), and optionally `target`, `target_span`, `score_response`,
`segments` and `id`; empty fields count as left out, other fields are passed over.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from heat_fast.errors import (
    ConfigError,
    InputError,
    NumericalError,
    OutputError,
    UnsupportedModelError,
)
from heat_fast.files import check_rows_name, is_parquet
from heat_fast.journal import Journal
from heat_fast.provenance import identity, one_spelling
from heat_fast.result import Attribution
from heat_fast.rows import Row, read_rows
from heat_fast.storage import read_jsonl, to_line
from heat_fast.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from heat_fast.attributor import Attributor

__all__ = ["Summary", "attribute_rows"]

#: Fields that hold what a row asks for; a misspelt one must not pass for somebody else's column.
_FIELDS: Final = (
    *("prompt", "messages", "chat_template_kwargs"),
    *("target", "target_span", "score_response", "segments"),
)
#: What tells one model from another in a result's metadata.
_MODEL_SETTINGS: Final = {
    "model": "model",
    "name": "model_name",
    "dtype": "dtype",
    "adapters": "adapters",
    "weights": "weights",
}
#: Errors that a row brings about whenever it is tried; others (memory, the machine) may pass.
_LASTING: Final = (InputError.__name__, NumericalError.__name__)


@dataclass
class Summary:
    """How far a run is: rows done and failed in it, and rows done and failed before it."""

    done: int = 0
    failed: int = 0
    before: int = 0
    failed_before: int = 0
    tokens: int = 0
    seconds: float = 0.0


# --- the output -----------------------------------------------------------------------------------


def attribute_rows(
    attributor: Attributor,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    errors: str | os.PathLike[str] | None = None,
    report: Callable[[Summary], None] | None = None,
    *,
    retry_failed: bool = False,
) -> Summary:
    """Attribute the rows of `source` that `output` does not hold yet; see the module for the files.

    errors: the side file of rows that failed, by default the output's name with `.errors.jsonl`
    behind it. `report` is called after every row. retry_failed: try all of them again, not only
    those that failed for want of memory, say, or under other settings.

    Raises InputError where a file is of another kind by its name, or the input cannot be read, or
    is not the one that the output was begun with; ConfigError where the output was begun with
    another model, dtype or settings; OutputError where it cannot be written. Whatever goes wrong in
    a row is a line of the side file.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"source is {type(source).__name__}: expected the path of a JSON Lines or Parquet "
            "file, for an interrupted run goes on by it. Write the rows to one, or attribute them "
            "one by one."
        )
    output = Path(output)
    parquet = is_parquet(output)
    journal = output.with_name(output.name + ".partial.jsonl") if parquet else output
    reasons_path = Path(errors) if errors is not None else Path(f"{output}.errors.jsonl")
    for path in (output, reasons_path):
        check_rows_name(path, "Choose another name.")
    settings, summary = _settings(attributor), Summary()
    with closing(Journal(journal)) as lines, closing(Journal(reasons_path)) as side:
        copied = False
        try:
            copied = parquet and output.exists() and _take_over(output, lines)
            done = dict(_finished(lines, settings, output))
            reasons = list(_reasons(side))
            lasting = [] if retry_failed else [each for each in reasons if _lasts(each, settings)]
            failed = {reason["row"]: reason["input"] for reason in lasting}
            _check_input(source, failed | done, output)
            if len(lasting) < len(reasons):
                # A row without a line is not done: whenever this is stopped, it is tried.
                side.rewrite(lasting)
            begin = perf_counter()
            for row in read_rows(source):
                if row.number in done:
                    summary.before += 1
                elif row.number in failed:
                    summary.failed_before += 1
                else:
                    _one(attributor, row, lines, side, settings, summary)
                summary.seconds = perf_counter() - begin
                if report is not None:
                    report(summary)
            if parquet:
                write_parquet(read_jsonl(journal), output)
                lines.remove()
            else:
                lines.keep()  # nothing to be attributed, or all failed: an output of no results
        finally:
            if copied and not summary.done:
                lines.remove()  # the output holds all of it
    return summary


def _take_over(output: Path, lines: Journal) -> bool:
    """Give the journal what the output holds and it does not; whether that is all it then has.

    A run that was stopped left a journal that has more, one that was killed at once one with less.
    """
    held = {_row(line.get("metadata")) for line in lines.read() if isinstance(line, dict)}
    known = set()

    def missing() -> Iterator[str]:
        for result in read_parquet(output):
            row = _row(result.metadata)
            known.add(row)
            if row not in held:
                yield to_line(result)

    lines.extend(missing())
    return held <= known


def _row(metadata: Any) -> int | None:
    """The number of the row of a result."""
    mark = metadata.get("batch") if isinstance(metadata, Mapping) else None
    return mark["row"] if _is_mark(mark) else None


def _one(
    attributor: Attributor,
    row: Row,
    lines: Journal,
    side: Journal,
    settings: dict[str, Any],
    summary: Summary,
) -> None:
    mark = {"row": row.number, "input": row.digest}
    name = row.fields.get("id")
    name = None if name is None else str(name)
    try:
        result = _attribute(attributor, row)
    except (ConfigError, OutputError, UnsupportedModelError):
        raise  # every row would fail
    except Exception as error:  # whatever a row brings about, or the machine
        reason = {"kind": type(error).__name__, "error": str(error), "settings": settings}
        side.append(json.dumps({**mark, "id": name, **reason}) + "\n")
        summary.failed += 1
        return
    metadata = {**result.metadata, "batch": mark}
    lines.append(to_line(dataclasses.replace(result, id=name, metadata=metadata)))
    summary.done += 1
    summary.tokens += len(result)


def _attribute(attributor: Attributor, row: Row) -> Attribution:
    if row.error is not None:
        raise InputError(row.error)
    fields = {name: value for name, value in row.fields.items() if value is not None}
    for name in fields:
        close = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.8)
        if close and name not in _FIELDS:
            raise InputError(f"unknown field {name!r}: did you mean {close[0]!r}? Rename it.")
    if ("prompt" in fields) == ("messages" in fields):
        raise InputError(
            f"the row has {'both' if 'prompt' in fields else 'neither'} of prompt and messages: "
            "expected one of them beside target, target_span, score_response, segments and id. It "
            f"has {sorted(fields)}."
        )
    if "prompt" in fields and "chat_template_kwargs" in fields:
        raise InputError(
            "the row has chat_template_kwargs beside prompt: expected them beside messages, whose "
            "template takes them. Give messages, or leave them out."
        )
    prompt = fields["prompt"] if "prompt" in fields else _conversation(fields)
    span = fields.get("target_span")
    return attributor.attribute(
        prompt,
        fields.get("target"),
        target_span=tuple(span) if isinstance(span, list) else span,
        score_response=fields.get("score_response", False),
        segments=_filled(fields["segments"]) if "segments" in fields else None,
    )


def _conversation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat and its template's arguments."""
    messages, arguments = fields["messages"], fields.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise InputError("chat_template_kwargs is no object: expected names with their values.")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise InputError("messages is no list of objects: expected role and content in each.")
    *messages, arguments = [_filled(each) for each in (*messages, arguments)]
    return {"messages": messages, "chat_template_kwargs": arguments}


def _filled(value: Any) -> Any:
    """An object without the keys that other rows of a Parquet file have and it has not.

    A map of Parquet's is a list of keys and values.
    """
    if isinstance(value, list) and all(isinstance(each, tuple) for each in value):
        value = dict(value)
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if each is not None}


# --- what was done before -------------------------------------------------------------------------


def _finished(
    lines: Journal, settings: Mapping[str, Any], output: Path
) -> Iterator[tuple[int, str]]:
    """Numbers and digests of the rows whose results an earlier run wrote."""
    for line in lines.read():
        metadata = line.get("metadata") if isinstance(line, dict) else None
        if (
            not isinstance(metadata, dict)
            or not _is_mark(metadata.get("batch"))
            or not isinstance(metadata.get("config"), dict)
        ):
            raise _foreign(output if output.exists() else lines.path, "results")
        _check_settings(_settings_of(metadata), settings, output)
        yield metadata["batch"]["row"], metadata["batch"]["input"]


def _reasons(side: Journal) -> Iterator[Mapping[str, Any]]:
    """The lines of the side file."""
    for line in side.read():
        if not _is_mark(line) or not isinstance(line.get("settings", {}), dict):
            raise _foreign(side.path, "reasons")
        yield line


def _is_mark(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether it names a row and its digest."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("row"), int)
        and isinstance(value.get("input"), str)
    )


def _foreign(path: Path, what: str) -> InputError:
    return InputError(
        f"{str(path)!r} holds {what} that no batch wrote: expected a new file, or one that was "
        "begun. Choose another."
    )


def _lasts(reason: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a row that failed would fail again."""
    return reason.get("kind") in _LASTING and not _changed(reason.get("settings", {}), settings)


def _settings(attributor: Attributor) -> dict[str, Any]:
    """What all results of an output have to share: their model and the configuration.

    The same as `_settings_of` finds in the metadata of a result.
    """
    model: Any = attributor.model
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return {**_of_model({**identity(model), "dtype": dtype}), **attributor.config.to_dict()}


def _settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {**_of_model(metadata), **metadata["config"]}


def _of_model(known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a model, by the names that errors have for it."""
    return {shown: known[key] for key, shown in _MODEL_SETTINGS.items() if key in known}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ."""
    before, now = map(_spelled, (before, now))
    # A setting that came with a later version has its default in what was done before.
    return [name for name in now if name in before and before[name] != now[name]]


def _spelled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with a model's folder by its absolute path."""
    name = {key: one_spelling(str(settings[key])) for key in ("model_name",) if key in settings}
    return {**settings, **name}


def _check_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    changed = _changed(before, now)
    if changed:
        first = changed[0]
        raise ConfigError(
            f"{str(path)!r} was begun with {first} {before[first]!r}, not {now[first]!r}: expected "
            "the same model and settings to go on. Use them, or choose another output."
        )


def _check_input(source: str | os.PathLike[str], digests: Mapping[int, str], output: Path) -> None:
    """Raise InputError unless the input has the rows that these are the digests of."""
    left = dict(digests)
    rows = read_rows(source)
    while left:
        row = next(rows, None)
        if row is None:
            raise InputError(
                f"the input has no row {max(left)}, which {str(output)!r} was begun with: expected "
                "the same input to go on. Use it, or choose another output."
            )
        if left.pop(row.number, row.digest) != row.digest:
            raise InputError(
                f"row {row.number} is not the one that {str(output)!r} was begun with: expected "
                "the same input to go on. Use it, or choose another output."
            )
