"""``heat-fast attribute``: one prompt, explained."""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heat_fast.cli import options
from heat_fast.cli.common import (
    STANDARD_STREAM,
    UsageError,
    check_places,
    note,
    standard_output,
    write_json,
)
from heat_fast.cli.models import load_model
from heat_fast.cli.prompts import read_prompt, read_text
from heat_fast.config import HeatConfig

if TYPE_CHECKING:
    from heat_fast.result import Attribution


def attribute(
    config: HeatConfig,
    debug: bool,
    model: options.Model = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="The prompt."),
    ] = None,
    prompt_file: options.PromptFile = None,
    messages: options.Messages = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="TEXT",
            help="What to explain, following the prompt. Left out: the model's own next token.",
        ),
    ] = None,
    target_span: Annotated[
        str | None,
        typer.Option(
            "--target-span",
            metavar="A:B",
            help="Explain tokens A to B (exclusive) of the target only; the rest is context.",
        ),
    ] = None,
    score_response: Annotated[
        bool,
        typer.Option(
            "--score-response",
            help="Score the target's tokens before A too, as if they were the prompt's last.",
        ),
    ] = False,
    segment: Annotated[
        list[str] | None,
        typer.Option(
            "--segment",
            metavar="NAME=TEXT",
            help="Name a part of the prompt: the report then tells its share of the score. Its "
            "text, or the file that holds it (NAME=@F), or its characters A to B, exclusive "
            "(NAME=A:B). May be repeated.",
        ),
    ] = None,
    json_path: options.Json = None,
    save_path: Annotated[
        str | None,
        typer.Option("--save", metavar="F", help="Save the result as one safetensors file."),
    ] = None,
    html_path: Annotated[
        str | None,
        typer.Option(
            "--html", metavar="F", help="Write the report as one HTML page, for a browser."
        ),
    ] = None,
    top: options.Top = 10,
    special: options.Special = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Attribute a model's next words to the tokens of a prompt.

    Without --model and --prompt it explains an example with the embedded model.

    Example: heat-fast attribute --model ./my-model --prompt "The capital of France is" --top 5
    """
    text = read_prompt(prompt, prompt_file, messages, model)
    if text is None and _is_piped(sys.stdin):
        note("note: standard input is ignored; --prompt-file - reads the prompt from it.", quiet)
    if target == "":
        raise UsageError(
            "--target is empty: expected some text. Leave it out for the model's own choice."
        )
    span = _target_span(target, target_span)
    segments = _segments(segment)
    places = {"--json": json_path, "--save": save_path, "--html": html_path}
    check_places(places, streams=("--json",))
    loaded = load_model(model, device, dtype, debug=debug)
    from heat_fast.attributor import Attributor

    attributor = Attributor(loaded.model, loaded.tokenizer, config)
    result = attributor.attribute(
        loaded.example if text is None else text,
        target,
        target_span=span,
        score_response=score_response,
        segments=segments,
        progress=not quiet,
    )
    _write(result, json_path, save_path, html_path, top=top, special=special, quiet=quiet)


# --- before the work ------------------------------------------------------------------------------


def _is_piped(stream: Any) -> bool:
    """Whether somebody sent a file or the output of a program, as opposed to a terminal."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _target_span(target: str | None, text: str | None) -> tuple[int, int] | None:
    """Half-open range of target tokens."""
    if text is None:
        return None
    if target is None:
        raise UsageError(
            "--target-span without --target: expected the text that it is a part of. Give both."
        )
    found = _range(text)
    if found is None:
        raise UsageError(
            f"--target-span {text}: expected two whole numbers A:B, the first token and the one "
            "after the last. Write 0:3, say."
        )
    return found


def _segments(given: list[str] | None) -> dict[str, str | tuple[int, int]] | None:
    """The named parts of the prompt, each by its text or by a half-open range of characters."""
    found: dict[str, str | tuple[int, int]] = {}
    for each in given or ():
        name, sign, where = each.partition("=")
        if not (name and sign and where):
            raise UsageError(
                f"--segment {each}: expected NAME=TEXT, a part of the prompt's text, or NAME=A:B, "
                "its characters. Write --segment question='Where is it?', say."
            )
        if name in found:
            raise UsageError(
                f"--segment {name}=... is given twice: expected a name for each. Choose another."
            )
        found[name] = read_text(where[1:]) if where[0] == "@" else _range(where) or where
    return found or None


def _range(text: str) -> tuple[int, int] | None:
    """A and B of A:B; None for any other text."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return None if match is None else (int(match[1]), int(match[2]))


# --- after the work ------------------------------------------------------------------------------


def _write(
    result: Attribution,
    json_path: str | None,
    save_path: str | None,
    html_path: str | None,
    *,
    top: int,
    special: bool,
    quiet: bool,
) -> None:
    if save_path is not None:
        result.save(save_path)
        note(f"saved {save_path}", quiet)
    if html_path is not None:
        result.to_html(html_path)
        note(f"wrote {html_path}", quiet)
    if json_path is not None:
        write_json(result.to_dict(), json_path, quiet)
    if not quiet and json_path != STANDARD_STREAM:
        from heat_fast.terminal import print_result

        with standard_output():
            print_result(result, top=top, special=special)
