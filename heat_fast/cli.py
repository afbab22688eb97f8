"""The command line ``heat-fast``: options in, report and files out.

Exit codes: 0, 2 where the request was wrong, 1 where carrying it out failed. Nothing heavy is
imported before the options are known to make sense.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from heat_fast._version import __version__
from heat_fast.config import HeatConfig
from heat_fast.errors import ConfigError, HeatError, InputError, OutputError, UnsupportedModelError

if TYPE_CHECKING:
    from heat_fast.result import Attribution

__all__ = ["app", "main"]

_STANDARD_STREAM = "-"
_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")

app = typer.Typer(
    name="heat-fast",
    help="Which tokens of a prompt made a language model say what it says next.",
    no_args_is_help=True,
    # Errors are reported in one line; a traceback is for --debug.
    pretty_exceptions_enable=False,
)


class _UsageError(HeatError):
    """Options that make no sense together, or that name something unusable."""


class _LoadError(HeatError):
    """A model or tokenizer that cannot be loaded."""


def main() -> None:
    """Entry point of the ``heat-fast`` command."""
    app()


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
    # A callback makes `attribute` a subcommand although there is only one.
    pass


@app.command()
def attribute(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_ID",
            help="A model folder or hub id. Left out: the small embedded model.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="The prompt."),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            metavar="F",
            help="Read the prompt from a UTF-8 file, or from standard input (-). One newline at "
            "its end is not part of the prompt.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="TEXT",
            help="What to explain, following the prompt. Left out: the model's own next token.",
        ),
    ] = None,
    variant: Annotated[str, typer.Option(help="Preset of settings: full or gs.")] = "full",
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="F", help="Write the result as JSON; - for standard output alone."
        ),
    ] = None,
    save_path: Annotated[
        str | None,
        typer.Option("--save", metavar="F", help="Save the result as one safetensors file."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens in the table.")] = 10,
    probes: Annotated[int | None, typer.Option(help="Probes of the curvature.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the probes.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the curvature.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of the information.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the gradient norm.")] = None,
    rollout: Annotated[
        str | None, typer.Option(help="Attention flow: value_path or input_path.")
    ] = None,
    masking: Annotated[
        str | None, typer.Option(help="Replacement of a token: zero, mean or sentinel.")
    ] = None,
    sentinel_token: Annotated[
        int | None, typer.Option(help="Token id for --masking sentinel.")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="Several targets into one score: mean, max or sum.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Number format of the model: {', '.join(_DTYPES)} (as stored).")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No report, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and library logs.")] = False,
) -> None:
    """Attribute a model's next words to the tokens of a prompt.

    Without --model and --prompt it explains an example with the embedded model.

    Example: heat-fast attribute --model ./my-model --prompt "The capital of France is" --top 5
    """
    with _errors_reported(debug):
        _survive_narrow_encodings()
        text = _read_prompt(prompt, prompt_file)
        if text is None and model is not None:
            raise _UsageError(
                "--model without a prompt: expected --prompt TEXT or --prompt-file F. Give one."
            )
        if target == "":
            raise _UsageError(
                "--target is empty: expected some text. Leave it out for the model's own choice."
            )
        overrides = {
            "probes": probes,
            "seed": seed,
            "beta": beta,
            "gamma": gamma,
            "alpha": alpha,
            "rollout": rollout,
            "masking": masking,
            "sentinel_token": sentinel_token,
            "aggregate": aggregate,
        }
        config = HeatConfig.preset(
            variant, **{name: value for name, value in overrides.items() if value is not None}
        )
        if dtype not in _DTYPES:
            raise _UsageError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}.")
        _check_outputs(json_path, save_path)
        result = _run(model, text, target, config, device, dtype, quiet=quiet, debug=debug)
        _write(result, json_path, save_path, top=top, quiet=quiet)


# --- before the work ------------------------------------------------------------------------------


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise _UsageError("both --prompt and --prompt-file: expected one of them. Drop the other.")
    if prompt_file is not None:
        name = "standard input" if prompt_file == _STANDARD_STREAM else repr(prompt_file)
        try:
            data = (
                sys.stdin.buffer.read()
                if prompt_file == _STANDARD_STREAM
                else Path(prompt_file).read_bytes()
            )
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _UsageError(
                f"{name} is not UTF-8 ({error.reason} at byte {error.start}): expected UTF-8 text. "
                "Convert it first."
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _UsageError(
                f"cannot read the prompt from {name}: {reason}. Expected a readable text file. "
                "Check the path."
            ) from error
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if prompt == "":
        raise _UsageError("the prompt is empty: expected at least one token. Give some text.")
    return prompt


def _check_outputs(json_path: str | None, save_path: str | None) -> None:
    if save_path == _STANDARD_STREAM:
        raise _UsageError("--save -: expected a file name, since the file is binary. Give one.")
    paths = [path for path in (json_path, save_path) if path not in (None, _STANDARD_STREAM)]
    if not paths:
        return
    if len(paths) == 2 and os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
        raise _UsageError(f"--json and --save both name {paths[0]!r}: expected different files.")
    from heat_fast.result import check_writable

    for path in paths:
        try:
            check_writable(path)
        except OutputError as error:
            raise _UsageError(str(error)) from error


# --- the work -------------------------------------------------------------------------------------


def _run(
    model_name: str | None,
    prompt: str | None,
    target: str | None,
    config: HeatConfig,
    device: str,
    dtype: str,
    *,
    quiet: bool,
    debug: bool,
) -> Attribution:
    place = _device(device)
    if not debug:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if model_name is None:
        model, tokenizer, example = _load_embedded(place, dtype)
        prompt = example if prompt is None else prompt
    else:
        model, tokenizer = _load(model_name, place, dtype)
    from heat_fast.attributor import Attributor

    with _progress(enabled=not quiet) as progress:
        return Attributor(model, tokenizer, config).attribute(prompt, target, progress=progress)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise _UsageError(
            f"--device {name} cannot be used ({reason}): expected a device of this machine. "
            "Choose cpu, or auto."
        ) from error
    if device.type == "meta":
        raise _UsageError("--device meta holds no numbers: expected a real device. Choose cpu.")
    return device


def _load_embedded(device: Any, dtype: str) -> tuple[Any, Any, str]:
    import torch

    from heat_fast.demo import load_demo_model

    try:
        embedded = load_demo_model(1)
    except FileNotFoundError as error:
        raise _LoadError(str(error)) from error
    model: Any = embedded.model
    model = model.to(device) if dtype == "auto" else model.to(device, getattr(torch, dtype))
    return model, embedded.tokenizer, embedded.examples[0].prompt


def _load(name: str, device: Any, dtype: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder or the hub."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    local = os.path.isdir(name)
    if not local and (os.path.exists(name) or name.startswith((".", "/", "~", os.sep))):
        raise _LoadError(
            f"there is no model folder {name!r}: expected a directory with config.json and "
            "weights, or a hub id. Check the path."
        )
    options: dict[str, Any] = {"local_files_only": local}
    with _loading(name, "configuration"):
        config = AutoConfig.from_pretrained(name, **options)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name!r} is an encoder-decoder model ({config.model_type}): expected a decoder-only "
            "language model. Choose one such as Llama, Qwen2 or GPT-2."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type} model, which is not a causal language model: "
            "expected a decoder-only one. Choose one such as Llama, Qwen2 or GPT-2."
        )
    with _loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    with _loading(name, "weights"):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def _loading(name: str, part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # loaders raise many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _LoadError(
            f"cannot load the {part} of {name!r}: {lines[0]} Expected a folder written by "
            "save_pretrained() or a hub id that can be reached. Check the name; --debug shows all."
        ) from error


@contextlib.contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress callback that draws one bar per component on standard error, or None."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(component: str, done: int, total: int) -> None:
            if component == "total":  # it ends only when everything has: no bar to watch
                return
            if component not in tasks:
                tasks[component] = bars.add_task(component, total=total)
            bars.update(tasks[component], completed=done, total=total)

        yield update


# --- after the work -------------------------------------------------------------------------------


def _write(
    result: Attribution,
    json_path: str | None,
    save_path: str | None,
    *,
    top: int,
    quiet: bool,
) -> None:
    from heat_fast.result import write_file

    if save_path is not None:
        result.save(save_path)
        _note(f"saved {save_path}", quiet)
    if json_path is not None:
        text = json.dumps(result.to_dict(), allow_nan=False) + "\n"
        if json_path == _STANDARD_STREAM:
            sys.stdout.write(text)
        else:
            write_file(json_path, text.encode("utf-8"))
            _note(f"wrote {json_path}", quiet)
    if not quiet and json_path != _STANDARD_STREAM:
        from heat_fast.terminal import print_result

        print_result(result, top=top)


def _note(text: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(text, err=True)


def _survive_narrow_encodings() -> None:
    """Print what a terminal's encoding cannot hold as an escape, rather than fail at the end."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _errors_reported(debug: bool) -> Iterator[None]:
    """One line on standard error and the right exit code for whatever goes wrong."""
    try:
        yield
    except (_UsageError, ConfigError, InputError) as error:
        _fail(str(error), 2, debug)
    except HeatError as error:
        _fail(str(error), 1, debug)
    except KeyboardInterrupt:
        _fail("interrupted before the work was done", 1, debug)
    except BrokenPipeError:
        raise  # the reader went away: click ends quietly
    except Exception as error:  # everything else is unexpected
        hint = "" if debug else " Run again with --debug for the traceback."
        _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"heat-fast: error: {message}", err=True)
    raise typer.Exit(code)
