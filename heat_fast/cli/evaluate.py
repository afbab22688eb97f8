"""``heat-fast evaluate``: models x data x methods x metrics from one TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heat_fast.cli import options
from heat_fast.cli.common import standard_output


def evaluate(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A TOML file, or a preset's name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.")
    ],
    quiet: options.Quiet = False,
) -> None:
    """Evaluate attribution methods; a run that was stopped goes on where it was.

    Example: heat-fast evaluate quick --output results
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from heat_fast.evaluation import evaluate as run
    from heat_fast.evaluation import load_plan, write_tables

    chosen = load_plan(plan)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("attributions", total=None)
        rows = run(
            chosen, output, lambda done, total: bar.update(task, completed=done, total=total)
        )
    write_tables(chosen, rows, output)
    with standard_output():
        typer.echo((output / "tables.md").read_text(encoding="utf-8"), nl=False)
