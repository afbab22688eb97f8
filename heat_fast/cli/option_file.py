"""A file that sets the options of commands, and which stand on the command line itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import typer

from heat_fast.checks import suggest
from heat_fast.cli.common import UsageError, fail

#: Settings that are whole numbers or "auto".
COUNTS = ("probes", "codes")
#: What a file of options holds for a parameter of some type, and how an error calls it.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
_TEXT = ((str, int, float), "text or a number")


def read_file(context: typer.Context, path: str | None) -> str | None:
    """Make the values of a TOML file the defaults of a command's options."""
    if path is None or context.resilient_parsing:  # completion asks for no errors
        return path
    try:
        values = _toml(path)
        own = _options(context.command)
        group: Any = context.parent.command if context.parent is not None else None
        others = () if group is None else group.commands.values()
        known = {name: each for other in others for name, each in _options(other).items()} | own
        defaults = {}
        for name, value in values.items():
            key = name.replace("-", "_")
            if key not in known:
                raise UsageError(
                    f"--config {path}: unknown option {name!r}: expected the name of an option, "
                    f"without its dashes. {suggest(key, known)}"
                )
            parameter, kind, several = known[key]
            found = value if several and isinstance(value, list) else [value]
            expected = next(filter(None, (_misfit(key, kind, each) for each in found)), None)
            if expected is not None:
                raise UsageError(
                    f"--config {path}: {name} = {json.dumps(value, default=str)}: expected "
                    f"{expected}. Correct it."
                )
            if key in own:  # one file may serve several commands
                texts = [each if kind is bool else str(each) for each in found]
                defaults[parameter] = texts if several else texts[0]
    except UsageError as error:
        fail(str(error), 2, False)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _misfit(name: str, kind: Any, value: Any) -> str | None:
    """What was expected of an option's value in a file, where it is something else.

    As strict as the library, for which neither true nor "3" is a number.
    """
    if name in COUNTS:
        return None if type(value) is int or value == "auto" else 'a whole number or "auto"'
    types, words = _KINDS.get(kind, _TEXT)
    return None if type(value) in types else words


def _toml(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
        return values
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {path} is not TOML ({error}): expected lines such as probes = 4. Correct it."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot read --config {path}: {reason}. Expected a readable TOML file. Check the path."
        ) from error


def _options(command: Any) -> dict[str, tuple[str, Any, bool]]:
    """What a file may set of a command, by its name there: parameter, type, and whether several."""
    types = command.callback.__annotations__
    return {
        option.lstrip("-").replace("-", "_"): (
            parameter.name,
            _type(types[parameter.name]),
            getattr(parameter, "multiple", False),
        )
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and parameter.name not in ("help", "config_file")
    }


def on_command_line(context: typer.Context) -> dict[str, str]:
    """Options that stand on the command line itself, not in a file of options, by parameter."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            found[str(parameter.name)] = parameter.opts[0]
    return found


def _type(annotation: Any) -> Any:
    """What one value is: int of `Annotated[list[int] | None, ...]`."""
    while arguments := get_args(annotation):
        annotation = arguments[0]
    return annotation
