"""A file that grows line by line: what a kill leaves of it, and who may write it."""

from __future__ import annotations

import fcntl
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from heat_fast.errors import InputError, OutputError
from heat_fast.journal import Journal


def test_a_line_that_was_cut_off_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    with closing(Journal(path)) as journal:
        assert list(journal.read()) == [{"a": 1}, {"a": 2}]
        journal.append('{"a": 3}\n')
        assert [line["a"] for line in journal.read()] == [1, 2, 3]
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_another_kind_of_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("words\nmore")
    with (
        closing(Journal(path)) as journal,
        pytest.raises(InputError, match=r"lines\.jsonl' holds a line that is not JSON: expected"),
    ):
        list(journal.read())
    assert path.read_text() == "words\nmore"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with closing(Journal(path)) as journal:
        with pytest.raises(OutputError, match=r"^'.*lines\.jsonl' is in use, .* Wait for it, or"):
            Journal(path)
        with pytest.raises(OutputError, match=r"^the folder is in use"):
            Journal(path, "the folder")
        journal.append("1\n")
    with closing(Journal(path)) as journal:
        assert list(journal.read()) == [1]
        journal.rewrite([])
    assert not path.exists()  # an empty one leaves no file


def test_an_empty_one_may_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with closing(Journal(path)) as journal:
        journal.keep()
    assert path.read_bytes() == b""
    with closing(Journal(path)) as journal:  # as one that was begun
        assert list(journal.read()) == []
        journal.append("1\n")
    assert path.read_text() == "1\n"


def test_a_file_that_was_removed_while_it_was_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another run, which closed its own while it was empty: lines must not go nowhere."""
    path, flock, calls = tmp_path / "lines.jsonl", fcntl.flock, []

    def late(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        flock(file, how)

    monkeypatch.setattr("heat_fast.journal.fcntl.flock", late)
    with closing(Journal(path)) as journal:
        journal.append("1\n")
    assert path.read_text() == "1\n"
    assert len(calls) == 2


def test_a_pipe_cannot_be_gone_on_with(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match=r"it is a pipe, a device or a directory"):
        Journal(pipe)
    assert pipe.is_fifo()


def test_an_empty_journal_leaves_a_link_to_it(tmp_path: Path) -> None:
    """As /dev/stdout is one, to whatever standard output is."""
    link, place = tmp_path / "link", tmp_path / "place"
    place.touch()
    link.symlink_to(place)
    with closing(Journal(link)):
        pass
    assert link.is_symlink() and not place.exists()
    with closing(Journal(link)) as journal:
        journal.append('{"row": 1}\n')
    assert link.is_symlink() and place.read_text() == '{"row": 1}\n'
