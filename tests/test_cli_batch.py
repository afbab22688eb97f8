"""`heat-fast batch`: what it tells, and wrong requests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from heat_fast.cli import app
from test_batch import BAD, GOOD, lines, write


@pytest.fixture
def run(model_folder: str) -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        options = ["--model", model_folder, "--variant", "gs"]
        return CliRunner().invoke(app, ["batch", *map(str, arguments), *options])

    return call


def test_it_tells_what_was_done(run: Callable[..., Any], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*GOOD, BAD[0][0]])
    side = tmp_path / "reasons"
    outcome = run(source, tmp_path / "out.jsonl", "--errors", side)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == ""
    assert "4 rows attributed" in outcome.stderr and "1 failed" in outcome.stderr
    assert "rows/s" in outcome.stderr and "tokens/s" in outcome.stderr
    assert len(lines(side)) == 1
    assert run(source, tmp_path / "out.jsonl", "--errors", side, "--quiet").output == ""


def test_a_log_gets_a_line_now_and_then(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    assert " of 4 rows, " not in run(source, tmp_path / "one.jsonl").stderr
    # Its package shows the command under the module's name.
    monkeypatch.setattr(sys.modules["heat_fast.cli.batch"], "SECONDS_BETWEEN_LINES", 0.0)
    told = run(source, tmp_path / "two.jsonl").stderr
    assert [f"{number} of 4 rows, " in told for number in range(6)] == [
        number in (1, 2, 3, 4) for number in range(6)
    ]


def test_where_every_row_fails_that_is_an_error(run: Callable[..., Any], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [BAD[0][0], BAD[2][0]])
    outcome = run(source, tmp_path / "out.jsonl")
    assert outcome.exit_code == 1
    assert "all 2 rows failed" in outcome.stderr
    side = tmp_path / "out.jsonl.errors.jsonl"
    assert len(lines(side)) == 2
    # Nothing is left to do, which is no success.
    outcome = run(source, tmp_path / "out.jsonl")
    assert outcome.exit_code == 1
    assert "0 failed; 2 failed before; reasons in" in outcome.stderr
    assert "all 2 rows failed" in outcome.stderr and "--retry-failed" in outcome.stderr
    outcome = run(source, tmp_path / "out.jsonl", "--retry-failed")
    assert outcome.exit_code == 1
    assert "2 failed; reasons in" in outcome.stderr
    assert len(lines(side)) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jsonl", "out.jsonl"], "cannot read 'none.jsonl': No such file"),
        (["in.jsonl", "in.jsonl"], "is both input and output"),
        (["in.jsonl", "out.jsonl", "--errors", "out.jsonl"], "expected different files"),
        (["in.jsonl", "-"], "reads and writes files"),
        (["in.jsonl", "no-folder/out.jsonl"], "does not exist"),
        (["in.jsonl", "out.jsonl", "--probes", "few"], "--probes few"),
        (["in.jsonl", "out.csv"], "'out.csv' is a .csv file by its name: expected JSON Lines"),
        (["in.jsonl", "out.JSON"], "Choose another name."),
        (["in.jsonl", "out.jsonl.gz"], "is a .gz file by its name"),
        (["in.jsonl", "out.jsonl", "--errors", "why.tsv"], "'why.tsv' is a .tsv file"),
    ],
)
def test_wrong_requests(
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", GOOD)
    outcome = run(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert words in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.jsonl"]
