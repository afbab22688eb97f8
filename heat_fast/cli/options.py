"""Options that several commands take, declared once (`option_file.py`: a file that may set them).

A command is a function whose parameters are its own options. Where it has a parameter `config` it
takes an option for every field of `HeatConfig` as well, and is called with the configuration;
`debug` stands for `--debug`. All commands take `--config`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args, get_type_hints

import typer

from heat_fast import config as settings
from heat_fast.cli.common import (
    UsageError,
    errors_reported,
    fail,
    survive_narrow_encodings,
)
from heat_fast.cli.option_file import COUNTS, read_file
from heat_fast.config import PRESETS, HeatConfig

_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")
_PANEL = "Settings"


def choices(names: Iterable[str]) -> str:
    """How --help shows the values an option takes."""
    return f"[{'|'.join(names)}]"


def _values(literal: Any) -> str:
    return choices(get_args(literal))


def _starting(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Shell completion from a list of values."""
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def setting(*names: str, values: Any = None, **options: Any) -> Any:
    """An option of the settings' panel; `values`: the Literal that it takes one of."""
    if values is not None:
        options |= {"metavar": _values(values), "autocompletion": _starting(get_args(values))}
    return typer.Option(*names, rich_help_panel=_PANEL, **options)


def _dtype(name: str) -> str:
    if name not in _DTYPES:
        fail(f"--dtype {name}: expected one of {', '.join(_DTYPES)}.", 2, False)
    return name


# --- the model and its prompt ---------------------------------------------------------------------

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="A model folder or hub id. Left out: the small embedded model.",
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompt-file",
        metavar="F",
        help="Read the prompt from a UTF-8 file, or from standard input (-). One newline at its "
        "end is not part of the prompt.",
    ),
]
Messages = Annotated[
    str | None,
    typer.Option(
        "--messages",
        metavar="F",
        help="Read a chat from a JSON file, or from standard input (-): a list of messages with "
        "role and content, put into words by the model's chat template; or an object with such "
        "messages and chat_template_kwargs.",
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar=choices(_DTYPES),
        callback=_dtype,
        autocompletion=_starting(_DTYPES),
        help="Number format of the model; auto: as it is stored.",
    ),
]
Tokens = Annotated[int, typer.Option(metavar="N", min=1, help="Prompt tokens.")]
Targets = Annotated[int, typer.Option(metavar="N", min=1, help="Target tokens.")]

# --- results and reports --------------------------------------------------------------------------

Id = Annotated[
    str | None,
    typer.Option(
        "--id", metavar="ID", help="Which result of a file of many: its id, or its row from 1."
    ),
]
Top = Annotated[int, typer.Option(min=1, help="Tokens in the table.")]
Special = Annotated[
    bool,
    typer.Option(
        "--special/--no-special",
        help="Rank special tokens and those of the chat template as well, or leave them out.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No report, no progress.")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="F", help="Write the result as JSON; - for standard output alone."
    ),
]


# --- the fields of HeatConfig ---------------------------------------------------------------------


def _settings(
    variant: Annotated[
        str,
        setting(
            metavar=choices(PRESETS),
            autocompletion=_starting(PRESETS),
            help="Preset of settings.",
        ),
    ] = "full",
    curvature: Annotated[
        str | None,
        setting(
            values=settings.Curvature,
            help="Kind of curvature; hessian unless the variant says otherwise.",
        ),
    ] = None,
    estimator: Annotated[
        str | None,
        setting(
            values=settings.Estimator,
            help="How the Hessian's curvature is measured: block by definition; coded estimates "
            "the same at a cost that does not grow with the prompt; row is another quantity; "
            "low_rank takes the blocks of a low-rank approximation.",
        ),
    ] = None,
    probes: Annotated[
        str | None,
        setting(
            metavar="N|auto", help="Probes of the curvature; auto: until the ranking is settled."
        ),
    ] = None,
    probes_max: Annotated[
        int | None, setting(metavar="N", help="Most probes of --probes auto; 64 if left out.")
    ] = None,
    top_k: Annotated[
        int | None,
        setting(metavar="N", help="Leading tokens whose order --probes auto settles; 10."),
    ] = None,
    confidence: Annotated[
        float | None, setting(help="With what confidence --probes auto settles it; 0.95.")
    ] = None,
    codes: Annotated[
        str | None,
        setting(
            metavar="N|auto",
            help="Sign codes of --estimator coded; auto: as many as the noise asks for.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        setting(
            metavar="N",
            help="Gate and curvature through the last N blocks only; all unless the variant says "
            "otherwise.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        setting(metavar="N", help="Cut a longer prompt into windows of so many tokens."),
    ] = None,
    overlap: Annotated[
        float | None,
        setting(help="Share of a window that the next one repeats; 0.5 if left out."),
    ] = None,
    sink: Annotated[
        int | None,
        setting(metavar="N", help="First tokens that every window keeps; 1 if left out."),
    ] = None,
    tail: Annotated[
        int | None,
        setting(metavar="N", help="Last tokens that every window keeps; 64 if left out."),
    ] = None,
    window_weights: Annotated[
        str | None,
        setting(
            values=settings.WindowWeights,
            help="How windows count: by the probability they give the target, or all alike.",
        ),
    ] = None,
    window_tolerance: Annotated[
        float | None,
        setting(help="Leave out windows that weigh at most this share of the best one."),
    ] = None,
    rank: Annotated[int | None, setting(help="Rank of --estimator low_rank.")] = None,
    rank_scope: Annotated[
        str | None,
        setting(
            values=settings.RankScope,
            help="That rank for all tokens together, or for every token's own block.",
        ),
    ] = None,
    passes: Annotated[
        int | None,
        setting(metavar="[1|2]", help="2: twice the products, a better approximation."),
    ] = None,
    sketch: Annotated[float | None, setting(help="Test vectors as a multiple of --rank.")] = None,
    seed: Annotated[int | None, setting(help="Seed of the probes.")] = None,
    beta: Annotated[float | None, setting(help="Weight of the curvature.")] = None,
    gamma: Annotated[float | None, setting(help="Weight of the information.")] = None,
    alpha: Annotated[float | None, setting(help="Weight of the gradient norm.")] = None,
    rollout: Annotated[
        str | None, setting(values=settings.Rollout, help="Attention flow of the gate.")
    ] = None,
    masking: Annotated[
        str | None, setting(values=settings.Masking, help="What replaces a token's embedding.")
    ] = None,
    sentinel_token: Annotated[int | None, setting(help="Token id for --masking sentinel.")] = None,
    normalize: Annotated[
        str | None,
        setting(
            metavar=choices(("none", *get_args(settings.Normalize))),
            help="sum: curvature and information each sum to 1 before they are mixed.",
        ),
    ] = None,
    aggregate: Annotated[
        str | None,
        setting(values=settings.Aggregate, help="Several targets into one score per token."),
    ] = None,
    coverage: Annotated[
        float | None,
        setting(
            help="Leave out tokens' information once this share of its part of the score is "
            "likely to be measured (0.95, say)."
        ),
    ] = None,
    branch_tolerance: Annotated[
        float | None,
        setting(
            help="Skip what differs from the prompt's own run by less than this share when a "
            "token is masked (0.02, say)."
        ),
    ] = None,
    token_budget: Annotated[
        int | None, setting(metavar="N", help="Token rows in one batch; left to the planner.")
    ] = None,
    response_chunk: Annotated[
        int | None,
        setting(metavar="N", help="Target tokens explained at a time, to save memory; all."),
    ] = None,
    kernels: Annotated[
        str | None,
        setting(
            values=settings.Kernels,
            help="Compiled kernels (triton: GPU, native: CPU), or torch alone (reference).",
        ),
    ] = None,
) -> HeatConfig:
    """The configuration that the options ask for; what is left out follows the variant."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in COUNTS:
        if name in given:
            given[name] = _count(name, given[name])
    if normalize == "none":
        given["normalize"] = None
    return HeatConfig.preset(given.pop("variant"), **given)


def _count(option: str, text: str) -> int | str:
    """A whole number or "auto"; the configuration checks its range."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(
            f"--{option} {text}: expected a whole number of at least 1, or auto. Choose one."
        ) from error


# --- commands -------------------------------------------------------------------------------------

_CONFIG = inspect.Parameter(
    "config_file",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="F",
            is_eager=True,
            callback=read_file,
            help='A TOML file with options (probes = 4, model = "..."); those given here win.',
        ),
    ],
)
_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Tracebacks and library logs.")],
)


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command, with the options its parameters stand for."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = _parameters(function)
        takes_settings, takes_debug = "config" in own, "debug" in own
        added = _parameters(_settings) if takes_settings else {}
        kept = {name: each for name, each in own.items() if name not in ("config", "debug")}
        every = [*kept.values(), *added.values(), _CONFIG, _DEBUG]

        @functools.wraps(function)
        def call(**given: Any) -> None:
            given.pop("config_file")
            debug = given.pop("debug")
            with errors_reported(debug):
                survive_narrow_encodings()
                if takes_settings:
                    given["config"] = _settings(**{name: given.pop(name) for name in added})
                if takes_debug:
                    given["debug"] = debug
                function(**given)

        signature = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in every]
        call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in every}
        del call.__wrapped__
        app.command()(call)
        return function

    return register


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters with their annotations evaluated."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    return {name: each.replace(annotation=hints[name]) for name, each in parameters.items()}
