"""A file that grows line by line, so that work that is stopped can go on from what is there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from heat_fast.errors import InputError, OutputError

__all__ = ["Journal"]


class Journal:
    """A file of whole JSON Lines that is appended to, by one process at a time.

    place: what an error calls it where it is in use; by default its path.

    Raises OutputError where it cannot be written, or another process is writing it.

    Example:
        >>> import contextlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with contextlib.closing(Journal(Path(folder) / "done.jsonl")) as journal:
        ...         journal.append(json.dumps({"row": 1}) + chr(10))
        ...         list(journal.read())
        [{'row': 1}]
    """

    def __init__(self, path: Path, place: str | None = None) -> None:
        if path.exists() and not path.is_file():
            raise OutputError(
                f"cannot go on with {str(path)!r}: it is a pipe, a device or a directory. Expected "
                "a file, whose lines tell what is done. Choose another place."
            )
        # What a link stands for: an empty journal is removed in the end, and a link is not ours.
        self.path = Path(os.path.realpath(path))
        self.kept = False
        try:
            self.file = _locked(self.path)
        except BlockingIOError as error:
            raise OutputError(
                f"{place or repr(str(path))} is in use, being written by another process: expected "
                "to be the only one. Wait for it, or choose another output."
            ) from error
        except OSError as error:
            raise OutputError(
                f"cannot write {str(path)!r}: {error.strerror or error}. Expected a writable path. "
                "Choose another place."
            ) from error

    def read(self) -> Iterator[Any]:
        """The lines so far, after taking back one that was cut off.

        Raises InputError where one is not JSON; the file then stays as it is.
        """
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{str(self.path)!r} holds a line that is not JSON: expected the output of a "
                    "run that was begun. Choose another output, or remove it."
                ) from error
        self.file.truncate(whole)

    def append(self, line: str) -> None:
        """Write a line, so that it stays whatever happens to this process or the machine.

        Raises OutputError where there is no room for it.
        """
        self.extend((line,))

    def extend(self, lines: Iterable[str]) -> None:
        """Append several, which stay once all are written."""
        try:
            for line in lines:
                self.file.write(line.encode("ascii"))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {str(self.path)!r}: {error.strerror}. Expected room for the "
                "results. Make some; the same command then goes on from here."
            ) from error

    def rewrite(self, lines: list[Any]) -> None:
        """Write these lines in place of all that there are."""
        self.file.truncate(0)
        self.extend(json.dumps(line) + "\n" for line in lines)

    def remove(self) -> None:
        """Empty it, so that closing it leaves no file."""
        self.file.truncate(0)

    def keep(self) -> None:
        """Leave the file even if it is empty: the work is done, and there was none."""
        self.kept = True

    def close(self) -> None:
        """Close it; an empty one leaves no file, unless it is to be kept."""
        if not self.kept and os.fstat(self.file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self.file.close()


def _locked(path: Path) -> BinaryIO:
    """The file at a path, this process's alone. Raises BlockingIOError where it is another's."""
    while True:
        file = path.open("ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed it, empty, between opening and locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except OSError:
            file.close()
            raise
        file.close()
