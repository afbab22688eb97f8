"""What is done to pages before they are rendered.

- ``python no-run`` marks code that the tests compile and do not run; readers need not see it.
- ``<!-- options: NAME -->`` becomes the table of a command's arguments and options, taken from the
  command itself; ``<!-- settings -->`` that of the options which several commands share.
- Links to files beside the documentation are taken away where there is no address to link to.
"""

from __future__ import annotations

import re
from typing import Any

_NO_RUN = re.compile(r"^(\s*```python) no-run$", re.MULTILINE)
_OPTIONS = re.compile(r"^<!-- (?:options: (?P<command>[\w-]+)|settings) -->$", re.MULTILINE)
_SETTINGS = "Settings"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs with the text of every page."""
    markdown = _NO_RUN.sub(r"\1", markdown)
    return _OPTIONS.sub(lambda found: options(found["command"]), markdown)


def options(command: str | None) -> str:
    """A Markdown table: what a command takes beside the shared settings, or these (None)."""
    import typer

    from heat_fast.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parameters = commands[command or "attribute"].params
    shared = [each for each in parameters if getattr(each, "rich_help_panel", None) == _SETTINGS]
    shown = shared if command is None else [each for each in parameters if each not in shared]
    rows = [_row(each) for each in shown]
    if command is not None and shared:
        rows.append("| and the [settings](#settings) | |")
    return "\n".join(["| option | meaning |", "|---|---|", *rows])


def _row(parameter: Any) -> str:
    name = "/".join([*parameter.opts, *parameter.secondary_opts])
    if not name.startswith("-"):
        name = parameter.metavar or name.upper()
    elif not parameter.is_flag:
        name += f" {parameter.metavar or _kind(parameter)}"
    text = (parameter.help or "").replace("|", "\\|").replace("<", "&lt;")
    default = parameter.default
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        text += f" Default: `{default}`."
    return f"| `{name.replace('|', chr(92) + '|')}` | {text} |"


def _kind(parameter: Any) -> str:
    """How a value is shown that has no name of its own."""
    return "TEXT" if parameter.type_descriptor.annotation is str else "N"
