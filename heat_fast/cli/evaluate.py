"""``heat-fast evaluate``: models x data x methods x metrics from one TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from heat_fast.cli import options
from heat_fast.cli.common import standard_output
from heat_fast.cli.models import load_model


def evaluate(
    debug: bool,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A TOML file, or a preset's name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Folder or hub name, in place of the plan's models."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A data set, in place of the plan's; of two files, curated=PATH,narratives=PATH.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most examples of each data set.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Evaluate attribution methods; a run that was stopped goes on where it was.

    Writes rows.jsonl, tables.md, tables.tex, values.parquet, cells.parquet and figures.

    Example: heat-fast evaluate quick --output results

    heat-fast evaluate baselines --model ./llama --data longra=longra.jsonl --output results
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from heat_fast.evaluation import evaluate as run
    from heat_fast.evaluation import load_plan, write_plots, write_tables
    from heat_fast.evaluation.run import claim

    chosen = load_plan(plan, models=model or (), data=data or (), limit=limit)
    claim(output, chosen)  # what is wrong with models or folder is said before a bar is drawn

    def load(name: str | None) -> tuple[Any, Any]:
        loaded = load_model(name, device, dtype, debug=debug)
        return loaded.model, loaded.tokenizer

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("attributions", total=None)
        rows = run(
            chosen,
            output,
            lambda done, total: bar.update(task, completed=done, total=total),
            load,
            device=None if device == "auto" else device,
            dtype=None if dtype == "auto" else dtype,
        )
    write_plots(chosen, write_tables(chosen, rows, output), output)
    if not quiet:
        with standard_output():
            typer.echo((output / "tables.md").read_text(encoding="utf-8"), nl=False)
