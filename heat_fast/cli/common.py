"""What the commands share: errors as one line and an exit code, what they write and how."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Container, Iterator, Mapping
from typing import Any, Final, NoReturn

import typer

from heat_fast.config import HeatConfig
from heat_fast.errors import ConfigError, HeatError, InputError, OutputError

#: Stands for standard input or output where a file is named.
STANDARD_STREAM: Final = "-"


class UsageError(HeatError):
    """Options that make no sense together, or that name something unusable."""


class LoadError(HeatError):
    """A model or tokenizer that cannot be loaded."""


def check_places(places: Mapping[str, str | None], streams: Container[str] = ()) -> None:
    """Raise UsageError where an option names a file that cannot be written, or the same as another.

    `streams`: the options that may name standard output.
    """
    from heat_fast.files import check_writable

    seen: dict[str, str] = {}
    for option, path in places.items():
        if path is None or (path == STANDARD_STREAM and option in streams):
            continue
        if path == STANDARD_STREAM:
            raise UsageError(
                f"{option} -: expected a file name, since the file is no text. Give one."
            )
        place = os.path.realpath(path)
        if place in seen:
            raise UsageError(
                f"{seen[place]} and {option} both name {path!r}: expected different files."
            )
        seen[place] = option
        try:
            check_writable(path)
        except OutputError as error:
            raise UsageError(str(error)) from error


def write_json(values: Any, path: str, quiet: bool = False) -> None:
    """Write values as one line of JSON, to a file or to standard output."""
    text = json.dumps(values, allow_nan=False) + "\n"
    if path == STANDARD_STREAM:
        with standard_output() as stream:
            stream.write(text)
        return
    from heat_fast.files import write_file

    write_file(path, text.encode("utf-8"))
    note(f"wrote {path}", quiet)


@contextlib.contextmanager
def standard_output() -> Iterator[Any]:
    """Standard output, with everything really written at the end or an OutputError."""
    stream = sys.stdout
    if stream is None:
        raise OutputError(
            "standard output is closed: expected somewhere to write to. Leave it open, or use "
            "--quiet with --json F or --save F."
        )
    try:
        yield stream
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from error


def unwritable(error: OSError) -> OutputError:
    """The error about a standard output that failed so, which is written to no more."""
    # What the buffer still holds would fail once more when the interpreter ends.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    return OutputError(
        f"cannot write to standard output: {error.strerror or error}. Expected a place with "
        "room. Redirect it elsewhere; results can be written with --json F or --save F."
    )


def note(text: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(text, err=True)


def megabytes(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:,.1f} MB"


def survive_narrow_encodings() -> None:
    """Print what a terminal's encoding cannot hold as an escape, rather than fail at the end."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def errors_reported(debug: bool) -> Iterator[None]:
    """One line on standard error and the right exit code for whatever goes wrong."""
    try:
        yield
    except (ConfigError, InputError) as error:
        fail(in_options(error), 2, debug)
    except UsageError as error:
        fail(str(error), 2, debug)
    except HeatError as error:
        fail(str(error), 1, debug)
    except KeyboardInterrupt:
        fail("interrupted before the work was done", 1, debug)
    except BrokenPipeError:
        raise  # the reader went away: click ends quietly
    except Exception as error:  # everything else is unexpected
        hint = "" if debug else " Run again with --debug for the traceback."
        fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, debug)


# Settings, the longest first: `rank_scope` is not `rank`. Names that are no English words may be
# replaced wherever they stand, the others where a value follows.
_NAMES: Final = sorted(
    (field.name for field in dataclasses.fields(HeatConfig)), key=len, reverse=True
)
_UNMISTAKABLE: Final = re.compile(
    r"(?<![\w-])(beta|gamma|alpha|" + "|".join(name for name in _NAMES if "_" in name) + r")(?!\w)"
)
_SETTING: Final = re.compile(
    rf"(?<![\w-])({'|'.join(_NAMES)})="
    r"('[^']*'|<\w+>|-?\w[\w.+-]*\w|-?\w)"
)


def in_options(error: HeatError) -> str:
    """The message of an error about settings, in terms of the options that set them."""
    message = str(error)
    if not isinstance(error, ConfigError) and not message.startswith("sentinel_token="):
        return message  # it may quote a prompt, which has to stay as it is
    message = message.replace("unknown variant", "--variant: unknown variant", 1)
    message = _SETTING.sub(
        lambda found: f"--{found[1].replace('_', '-')} {found[2].strip(chr(39))}", message
    )
    return _UNMISTAKABLE.sub(lambda found: f"--{found[1].replace('_', '-')}", message)


def fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"heat-fast: error: {message}", err=True)
    raise typer.Exit(code)
