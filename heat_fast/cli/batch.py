"""``heat-fast batch``: many prompts from a file, their results into another."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from heat_fast.cli import options
from heat_fast.cli.common import STANDARD_STREAM, UsageError, check_places, note
from heat_fast.cli.models import load_model
from heat_fast.config import HeatConfig
from heat_fast.errors import HeatError
from heat_fast.files import check_rows_name

if TYPE_CHECKING:
    from heat_fast.batch import Summary

#: In a log: often enough to see that it lives, seldom enough to be read.
SECONDS_BETWEEN_LINES = 60.0

Report = Callable[["Summary"], None]


def batch(
    config: HeatConfig,
    debug: bool,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="JSON Lines, or Parquet by its ending. A row has prompt or messages, and may have "
            "target, target_span, score_response, segments and id.",
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT", help="Results as JSON Lines, or as Parquet by its ending."
        ),
    ],
    errors_path: Annotated[
        str | None,
        typer.Option(
            "--errors",
            metavar="F",
            help="Rows that failed, with the reason; OUTPUT.errors.jsonl if left out.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again every row that failed before.")
    ] = False,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Attribute every row of a file; run again after a stop, it goes on from there.

    A row that fails goes to the side file with its reason, and the others go on.

    Example: heat-fast batch prompts.jsonl why.parquet --model ./my-model --variant gs
    """
    side = f"{output}.errors.jsonl" if errors_path is None else errors_path
    _check_paths(source, output, side)
    from heat_fast.batch import attribute_rows
    from heat_fast.rows import count_rows

    rows = count_rows(source)
    loaded = load_model(model, device, dtype, debug=debug)
    from heat_fast.attributor import Attributor

    attributor = Attributor(loaded.model, loaded.tokenizer, config)
    try:
        with _progress(rows, quiet) as report:
            summary = attribute_rows(
                attributor, source, output, side, report, retry_failed=retry_failed
            )
    except KeyboardInterrupt:
        note(f"{output} keeps what was done; the same command goes on from there.", quiet)
        raise
    note(_told(summary, output, side), quiet)
    failed = summary.failed + summary.failed_before
    if failed and not summary.done and not summary.before:
        raise HeatError(
            f"all {failed} rows failed: expected one at least that does not. Their reasons are in "
            f"{side!r}. Mend them and pass --retry-failed, or change the settings."
        )


def _check_paths(source: str, output: str, side: str) -> None:
    if STANDARD_STREAM in (source, output, side):
        raise UsageError(
            "batch reads and writes files, not standard input and output, for it must find again "
            "what was done: expected file names. Give them."
        )
    if os.path.realpath(source) in map(os.path.realpath, (output, side)):
        raise UsageError(f"{source!r} is both input and output: expected different files.")
    for path in (output, side):
        check_rows_name(path, "Choose another name.")
    check_places({"OUTPUT": output, "--errors": side})


@contextlib.contextmanager
def _progress(rows: int, quiet: bool) -> Iterator[Report | None]:
    """A bar with throughput on standard error; a line now and then where that is no terminal."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _lines(rows)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("rows", total=rows)

        def report(summary: Summary) -> None:
            progress.update(task, completed=_finished(summary), description=_speed(summary))

        yield report


def _lines(rows: int) -> Report:
    """A report that writes a line every `SECONDS_BETWEEN_LINES`, for logs."""
    told = time.monotonic()

    def report(summary: Summary) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            note(f"{_finished(summary)} of {rows} rows, {_speed(summary)}", False)

    return report


def _finished(summary: Summary) -> int:
    return summary.before + summary.failed_before + summary.done + summary.failed


def _speed(summary: Summary) -> str:
    seconds = max(summary.seconds, 1e-9)
    return (
        f"{(summary.done + summary.failed) / seconds:.3g} rows/s, "
        f"{summary.tokens / seconds:,.0f} tokens/s, {summary.failed} failed"
    )


def _told(summary: Summary, output: str, side: str) -> str:
    text = f"{output}: {summary.done} rows attributed, {_speed(summary)}"
    if summary.before:
        text += f"; {summary.before} rows were done before"
    if summary.failed_before:
        text += f"; {summary.failed_before} failed before"
    return text + (f"; reasons in {side}" if summary.failed or summary.failed_before else "")
