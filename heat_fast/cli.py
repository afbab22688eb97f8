"""The command line ``heat-fast``: options in, report and files out.

Exit codes: 0, 2 where the request was wrong, 1 where carrying it out failed. Nothing heavy is
imported before the options are known to make sense.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import stat
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import typer

from heat_fast import config as settings
from heat_fast._version import __version__
from heat_fast.config import PRESETS, HeatConfig
from heat_fast.errors import ConfigError, HeatError, InputError, OutputError, UnsupportedModelError

if TYPE_CHECKING:
    from heat_fast.result import Attribution

__all__ = ["app", "main"]

_STANDARD_STREAM = "-"
_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")


def _choices(names: Iterable[str]) -> str:
    """How --help shows the values an option takes."""
    return f"[{'|'.join(names)}]"


def _values(literal: Any) -> str:
    return _choices(get_args(literal))


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
    variant: Annotated[
        str, typer.Option(metavar=_choices(PRESETS), help="Preset of settings.")
    ] = "full",
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
    html_path: Annotated[
        str | None,
        typer.Option(
            "--html", metavar="PATH", help="Write the report as one HTML page, for a browser."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens in the table.")] = 10,
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar=_values(settings.Curvature),
            help="Kind of curvature; hessian unless the variant says otherwise.",
        ),
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            metavar=_values(settings.Estimator),
            help="How the Hessian's curvature is measured: block by definition; coded estimates "
            "the same at a cost that does not grow with the prompt; row is another quantity; "
            "low_rank takes the blocks of a low-rank approximation.",
        ),
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="Probes of the curvature; auto: until the ranking is settled."
        ),
    ] = None,
    codes: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Sign codes of --estimator coded; auto: as many as the noise asks for.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Gate and curvature through the last N blocks only; all unless the variant says "
            "otherwise.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut a longer prompt into windows of so many tokens."),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Share of a window that the next one repeats; 0.5 if left out."),
    ] = None,
    sink: Annotated[
        int | None,
        typer.Option(metavar="N", help="First tokens that every window keeps; 1 if left out."),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option(metavar="N", help="Last tokens that every window keeps; 64 if left out."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of --estimator low_rank.")] = None,
    rank_scope: Annotated[
        str | None,
        typer.Option(
            metavar=_values(settings.RankScope),
            help="That rank for all tokens together, or for every token's own block.",
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(metavar="[1|2]", help="2: twice the products, a better approximation."),
    ] = None,
    sketch: Annotated[
        float | None, typer.Option(help="Test vectors as a multiple of --rank.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the probes.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the curvature.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of the information.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the gradient norm.")] = None,
    rollout: Annotated[
        str | None,
        typer.Option(metavar=_values(settings.Rollout), help="Attention flow of the gate."),
    ] = None,
    masking: Annotated[
        str | None,
        typer.Option(metavar=_values(settings.Masking), help="What replaces a token's embedding."),
    ] = None,
    sentinel_token: Annotated[
        int | None, typer.Option(help="Token id for --masking sentinel.")
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar=_choices(("none", *get_args(settings.Normalize))),
            help="sum: curvature and information each sum to 1 before they are mixed.",
        ),
    ] = None,
    aggregate: Annotated[
        str | None,
        typer.Option(
            metavar=_values(settings.Aggregate), help="Several targets into one score per token."
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Leave out tokens' information once this share of its part of the score is "
            "likely to be measured (0.95, say)."
        ),
    ] = None,
    branch_tolerance: Annotated[
        float | None,
        typer.Option(
            help="Skip what differs from the prompt's own run by less than this share when a "
            "token is masked (0.02, say)."
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            metavar=_values(settings.Kernels),
            help="Compiled kernels (triton: GPU, native: CPU), or torch alone (reference).",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar=_choices(_DTYPES), help="Number format of the model; auto: as it is stored."
        ),
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
                "--model without a prompt: expected --prompt TEXT or --prompt-file F (- for "
                "standard input). Give one."
            )
        if text is None and _is_piped(sys.stdin):
            _note(
                "note: standard input is ignored; --prompt-file - reads the prompt from it.", quiet
            )
        if target == "":
            raise _UsageError(
                "--target is empty: expected some text. Leave it out for the model's own choice."
            )
        overrides: dict[str, Any] = {
            "curvature": curvature,
            "estimator": estimator,
            "probes": _count("--probes", probes),
            "codes": _count("--codes", codes),
            "layers": layers,
            "window": window,
            "overlap": overlap,
            "sink": sink,
            "tail": tail,
            "rank": rank,
            "rank_scope": rank_scope,
            "passes": passes,
            "sketch": sketch,
            "seed": seed,
            "beta": beta,
            "gamma": gamma,
            "alpha": alpha,
            "rollout": rollout,
            "masking": masking,
            "sentinel_token": sentinel_token,
            "normalize": normalize,
            "aggregate": aggregate,
            "coverage": coverage,
            "branch_tolerance": branch_tolerance,
            "kernels": kernels,
        }
        chosen = {name: value for name, value in overrides.items() if value is not None}
        if normalize == "none":
            chosen["normalize"] = None
        config = HeatConfig.preset(variant, **chosen)
        if dtype not in _DTYPES:
            raise _UsageError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}.")
        _check_outputs(json_path, save_path, html_path)
        result = _run(model, text, target, config, device, dtype, quiet=quiet, debug=debug)
        _write(result, json_path, save_path, html_path, top=top, quiet=quiet)


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


def _is_piped(stream: Any) -> bool:
    """Whether somebody sent a file or the output of a program, as opposed to a terminal."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _count(option: str, text: str | None) -> int | str | None:
    """A whole number or "auto"; the configuration checks its range."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise _UsageError(
            f"{option} {text}: expected a whole number of at least 1, or auto. Choose one."
        ) from error


def _check_outputs(json_path: str | None, save_path: str | None, html_path: str | None) -> None:
    for option, path, kind in (("--save", save_path, "binary"), ("--html", html_path, "a page")):
        if path == _STANDARD_STREAM:
            raise _UsageError(
                f"{option} -: expected a file name, since the file is {kind}. Give one."
            )
    given = {"--json": json_path, "--save": save_path, "--html": html_path}
    paths = {option: path for option, path in given.items() if path not in (None, _STANDARD_STREAM)}
    if not paths:
        return
    for (one, path), (other, another) in itertools.combinations(paths.items(), 2):
        if os.path.realpath(path) == os.path.realpath(another):
            raise _UsageError(f"{one} and {other} both name {path!r}: expected different files.")
    from heat_fast.result import check_writable

    for path in paths.values():
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
        # The hub's client reports every attempt to reach it; the error at the end says it once.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if model_name is None:
        model, tokenizer, example = _load_embedded(place, dtype)
        prompt = example if prompt is None else prompt
    else:
        model, tokenizer = _load(model_name, place, dtype)
    from heat_fast.attributor import Attributor

    return Attributor(model, tokenizer, config).attribute(prompt, target, progress=not quiet)


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
    if not local and sys.stderr.isatty():
        _note(f"there is no folder {name!r} here; asking the hub for it", False)
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not os.path.isdir(name):
            there = (
                "the hub could not be reached (nor is it in the hub's cache on this machine)"
                if _is_unreachable(error)
                else f"the hub's client says: {reason}"
            )
            reason = f"there is no folder of that name here, and {there}"
        raise _LoadError(
            f"cannot load the {part} of {name!r}: {_sentence(reason)} Expected a folder written by "
            "save_pretrained() or a hub id that can be reached. Check the name; --debug shows all."
        ) from error


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub's client gave up for want of a connection, somewhere behind this error."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _sentence(text: str) -> str:
    """A text that another sentence can follow."""
    text = text.rstrip().rstrip(":,;")
    return text if text.endswith((".", "!", "?")) else f"{text}."


# --- after the work -------------------------------------------------------------------------------


def _write(
    result: Attribution,
    json_path: str | None,
    save_path: str | None,
    html_path: str | None,
    *,
    top: int,
    quiet: bool,
) -> None:
    from heat_fast.result import write_file

    if save_path is not None:
        result.save(save_path)
        _note(f"saved {save_path}", quiet)
    if html_path is not None:
        result.to_html(html_path)
        _note(f"wrote {html_path}", quiet)
    if json_path is not None:
        text = json.dumps(result.to_dict(), allow_nan=False) + "\n"
        if json_path == _STANDARD_STREAM:
            with _standard_output() as stream:
                stream.write(text)
        else:
            write_file(json_path, text.encode("utf-8"))
            _note(f"wrote {json_path}", quiet)
    if not quiet and json_path != _STANDARD_STREAM:
        from heat_fast.terminal import print_result

        with _standard_output():
            print_result(result, top=top)


@contextlib.contextmanager
def _standard_output() -> Iterator[Any]:
    """Standard output, with everything really written at the end or an OutputError."""
    stream = sys.stdout
    if stream is None:
        raise OutputError(
            "standard output is closed: expected somewhere to write to. Leave it open, or use "
            "--quiet with --json F or --save F."
        )
    try:
        yield stream
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What the buffer still holds would fail once more when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        raise OutputError(
            f"cannot write to standard output: {error.strerror or error}. Expected a place with "
            "room. Redirect it elsewhere, or use --json F or --save F."
        ) from error


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
    except (ConfigError, InputError) as error:
        _fail(_in_options(error), 2, debug)
    except _UsageError as error:
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


# Names of settings that are no English words and may be replaced wherever they stand.
_UNMISTAKABLE = re.compile(
    r"(?<![\w-])(beta|gamma|alpha|sentinel_token|rank_scope|branch_tolerance)(?!\w)"
)
_SETTING = re.compile(
    r"(?<![\w-])(curvature|estimator|probes|codes|rank_scope|rank|passes|sketch|seed|beta|gamma|"
    r"alpha|rollout|masking|sentinel_token|normalize|aggregate|coverage|branch_tolerance|kernels|"
    r"variant)="
    r"('[^']*'|<\w+>|-?\w[\w.+-]*\w|-?\w)"
)


def _in_options(error: HeatError) -> str:
    """The message of an error about settings, in terms of the options that set them."""
    message = str(error)
    if not isinstance(error, ConfigError) and not message.startswith("sentinel_token="):
        return message  # it may quote a prompt, which has to stay as it is
    message = message.replace("unknown variant", "--variant: unknown variant", 1)
    message = _SETTING.sub(
        lambda found: f"--{found[1].replace('_', '-')} {found[2].strip(chr(39))}", message
    )
    return _UNMISTAKABLE.sub(lambda found: f"--{found[1].replace('_', '-')}", message)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"heat-fast: error: {message}", err=True)
    raise typer.Exit(code)
