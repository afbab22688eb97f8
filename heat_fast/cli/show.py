"""``heat-fast show``: a saved result as text, as a page or as JSON."""

from __future__ import annotations

from typing import Annotated

import typer

from heat_fast.cli import options
from heat_fast.cli.common import check_places, note, standard_output, write_json
from heat_fast.cli.results import read_result


def show(
    path: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A saved result: safetensors, JSON, JSON Lines or Parquet."
        ),
    ],
    name: options.Id = None,
    top: options.Top = 10,
    special: options.Special = True,
    html_path: Annotated[
        str | None, typer.Option("--html", metavar="F", help="Write a page instead.")
    ] = None,
    json_path: options.Json = None,
) -> None:
    """Show a saved result as text, or turn it into a page or JSON.

    Example: heat-fast show why.safetensors --top 5
    """
    check_places({"--html": html_path, "--json": json_path}, streams=("--json",))
    result = read_result(path, name)
    if json_path is not None:
        write_json(result.to_dict(), json_path)
    if html_path is not None:
        result.to_html(html_path)
        note(f"wrote {html_path}", False)
    if json_path is None and html_path is None:
        from heat_fast.terminal import print_result

        with standard_output():
            print_result(result, top=top, special=special)
