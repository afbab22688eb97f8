"""Writing a file whole or not at all; telling beforehand what can be written, and what is there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from heat_fast.errors import InputError, OutputError

__all__ = [
    "check_model_folder",
    "check_rows_name",
    "check_writable",
    "is_parquet",
    "replacing",
    "write_file",
]

#: Endings that promise something else than rows as JSON Lines or Parquet.
_OTHERS: Final = frozenset(
    ".json .csv .tsv .xls .xlsx .arrow .feather .safetensors .html .gz .bz2 .xz .zst .zip".split()
)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where :func:`write_file` would fail; meant for before the work starts.

    It creates and removes an empty file beside the target, since permissions alone do not tell.
    """
    place = _final_place(path)
    if _is_stream(place):
        if not os.access(place, os.W_OK):
            raise _cannot_write(place, "it is not writable", "Choose another place.")
        return
    temporary = _create_beside(place)
    os.close(temporary[0])
    os.unlink(temporary[1])


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file or nothing: into a temporary file beside it, then renamed over it.

    A symbolic link is followed, a device or pipe is written to directly. Raises OutputError.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write to, which takes the place of `path` once the block ends well.

    Where the block raises, what was there before stays. Raises OutputError.
    """
    place = _final_place(path)
    try:
        if _is_stream(place):
            with place.open("wb") as file:
                yield file
            return
        descriptor, temporary = _create_beside(place)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OutputError:
        raise
    except OSError as error:
        raise _cannot_write(place, str(error.strerror or error), "Choose another place.") from error


def _cannot_write(place: Path, why: str, do: str) -> OutputError:
    return OutputError(f"cannot write {str(place)!r}: {why}. Expected a writable file path. {do}")


def _is_stream(place: Path) -> bool:
    """Whether it is a device or a pipe, which is written to directly."""
    return place.exists() and not place.is_file() and not place.is_dir()


def _final_place(path: str | os.PathLike[str]) -> Path:
    """The file a path stands for, links followed, after the checks that need no writing."""
    if not os.fspath(path):
        raise OutputError("cannot write to an empty path. Expected a file name. Give one.")
    try:
        if _is_stream(Path(path)):
            return Path(path)
        place = Path(os.path.realpath(path))
        if place.is_dir():
            raise _cannot_write(place, "it is a directory", "Add a file name to it.")
        if not place.parent.is_dir():
            raise _cannot_write(
                place, "its directory does not exist", f"Create {str(place.parent)!r} first."
            )
        exists = os.path.lexists(place)
        os.stat(place) if exists else os.stat(place.parent)
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise _cannot_write(Path(path), str(error), "Choose another name.") from error
    if exists and not os.access(place, os.W_OK):
        raise _cannot_write(place, "the file is write-protected", "Choose another name.")
    return place


def _create_beside(place: Path) -> tuple[int, Path]:
    temporary = place.with_name(f".heat-fast-{secrets.token_hex(8)}.tmp")
    try:
        # Mode 0666 leaves the permissions to the user's umask, as an ordinary open() does.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _cannot_write(
            place, f"its directory is not writable ({error.strerror})", "Choose another place."
        ) from error
    return descriptor, temporary


def check_model_folder(name: str) -> None:
    """Raise InputError where a model's name can only be that of a folder, and there is none.

    A hub id has no more than one slash, and something on either side of it.

    Example:
        >>> check_model_folder("org/name")
        >>> check_model_folder("./name")
        Traceback (most recent call last):
        heat_fast.errors.InputError: there is no model folder './name': ...
    """
    as_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if not os.path.isdir(name) and (as_path or os.path.exists(name)):
        raise InputError(
            f"there is no model folder {name!r}: expected a directory with config.json and "
            "weights, or a hub id. Check the path."
        )


def check_rows_name(path: str | os.PathLike[str], do: str) -> None:
    """Raise InputError where a file's ending promises neither JSON Lines nor Parquet.

    Names without an ending, or with one that is nobody else's, are of JSON Lines. do: the error's
    last sentence.

    Example:
        >>> check_rows_name("rows.csv", "Convert it first.")
        Traceback (most recent call last):
        heat_fast.errors.InputError: 'rows.csv' is a .csv file by its name: expected JSON Lines...
    """
    suffix = Path(path).suffix.lower()
    if suffix in _OTHERS:
        raise InputError(
            f"{str(path)!r} is a {suffix} file by its name: expected JSON Lines (.jsonl), or "
            f"Parquet (.parquet). {do}"
        )


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it is a Parquet file; many rows lie in JSON Lines else."""
    return Path(path).suffix.lower() in (".parquet", ".pq")
