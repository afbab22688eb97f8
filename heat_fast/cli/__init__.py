"""The command line ``heat-fast``: options in, reports and files out; one module per command.

Exit codes: 0, 2 where the request was wrong, 1 where carrying it out failed. Nothing heavy is
imported before the options are known to make sense.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from heat_fast._version import __version__
from heat_fast.cli.attribute import attribute
from heat_fast.cli.batch import batch
from heat_fast.cli.bench import bench
from heat_fast.cli.common import unwritable
from heat_fast.cli.compare import compare
from heat_fast.cli.estimate import estimate
from heat_fast.cli.evaluate import evaluate
from heat_fast.cli.info import info
from heat_fast.cli.options import command
from heat_fast.cli.show import show

__all__ = ["app", "main"]

_NAME = "heat-fast"
app = typer.Typer(
    name=_NAME,
    help="Which tokens of a prompt made a language model say what it says next.",
    no_args_is_help=True,
    # Errors are reported in one line; a traceback is for --debug.
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the ``heat-fast`` command."""
    try:
        # Of `python -m heat_fast` too, whose completion would else be that of python.
        app(prog_name=_NAME)
    except OSError as error:  # of --help, say: commands report their own
        if error.filename is not None:
            raise
        sys.exit(f"{_NAME}: error: {unwritable(error)}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heat-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _function in (attribute, batch, show, compare, estimate, bench, evaluate, info):
    command(app)(_function)
