"""``heat-fast compare``: two results, two variants or two targets on one prompt, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from heat_fast.checks import nearest
from heat_fast.cli import options
from heat_fast.cli.common import UsageError, check_places, standard_output, write_json
from heat_fast.cli.models import load_model
from heat_fast.cli.option_file import on_command_line
from heat_fast.cli.prompts import read_prompt
from heat_fast.cli.results import holds_many, read_result
from heat_fast.config import PRESETS, HeatConfig
from heat_fast.errors import InputError
from heat_fast.readable import text_of

if TYPE_CHECKING:
    from rich.table import Table

    from heat_fast.comparison import Comparison
    from heat_fast.result import Attribution

#: Parameters that count where saved results are compared; the others are of making results.
_OF_RESULTS = ("left", "right", "name", "top", "json_path", "quiet", "config_file", "debug")


def compare(
    context: typer.Context,
    config: HeatConfig,
    debug: bool,
    left: Annotated[str | None, typer.Argument(metavar="[LEFT]", help="A saved result.")] = None,
    right: Annotated[
        str | None, typer.Argument(metavar="[RIGHT]", help="Another one of the same prompt.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar=options.choices(PRESETS),
            help="Instead of saved results: attribute the prompt with --variant and with this one.",
        ),
    ] = None,
    against_target: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Instead of saved results: attribute --target and this one; the table then tells "
            "what speaks for either.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt, without results.")
    ] = None,
    prompt_file: options.PromptFile = None,
    messages: options.Messages = None,
    target: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to explain, without results.")
    ] = None,
    name: options.Id = None,
    top: options.Top = 10,
    json_path: options.Json = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Compare two results of a prompt: leading tokens side by side, rank correlation.

    Example: heat-fast compare full.safetensors gs.safetensors

    Example: heat-fast compare --variant full --against gs --prompt "The capital of France is"

    Example: heat-fast compare --against gs --model ./my-chat-model --messages chat.json

    Example: heat-fast compare --prompt "2 + 2 =" --target " 4" --against-target " 5"
    """
    check_places({"--json": json_path}, streams=("--json",))
    given = on_command_line(context)
    if left is not None and not {"against", "against_target"} & given.keys():
        against = against_target = None  # of a file of options, which serves several commands
    if against is None and against_target is None:
        if left is None or right is None:
            raise UsageError(
                "compare needs two saved results, or --against VARIANT or --against-target TEXT "
                "and a prompt: expected heat-fast compare LEFT RIGHT. Give both."
            )
        idle = [option for parameter, option in given.items() if parameter not in _OF_RESULTS]
        if idle:
            raise UsageError(
                f"{', '.join(idle)} without --against or --against-target: expected nothing that "
                "makes results beside saved ones. Leave it out, or give two variants or targets "
                "instead of files."
            )
        names = left, right
        several = any(map(holds_many, names))
        # Of a file of one result beside a file of many the name chooses nothing.
        first, second = (
            read_result(path, name if holds_many(path) or not several else None) for path in names
        )
        pair = first, second
    else:
        if left is not None:
            raise UsageError(
                f"both {left!r} and --against or --against-target: expected saved results, or two "
                "variants or targets. Drop one."
            )
        if "name" in given:
            raise UsageError(
                "--id without saved results: expected it beside a file of many. Leave it out."
            )
        if against is not None and against not in PRESETS:
            raise UsageError(
                f"--against: unknown variant {against!r}: expected one of {', '.join(PRESETS)}. "
                + nearest(against, PRESETS)
            )
        if against_target == "" or target == "":
            raise UsageError(
                "an empty target: expected some text. Leave --target out for the model's choice."
            )
        other = config
        if against is not None:
            config, other = _of_each(config, against)
        text = read_prompt(prompt, prompt_file, messages, model)
        loaded = load_model(model, device, dtype, debug=debug)
        prompt_text = loaded.example if text is None else text
        targets = target, against_target
        pair = _two(loaded.model, loaded.tokenizer, prompt_text, targets, (config, other), quiet)
        names = config.variant, other.variant
        if against_target is not None:
            texts = [text_of(each.target_tokens) for each in pair]
            names = f"{names[0]} {texts[0]!r}", f"{names[1]} {texts[1]!r}"
    from heat_fast.comparison import compare_results

    comparison = compare_results(*pair)
    odds, why = _log_odds(comparison)
    if json_path is not None:
        write_json(_values(comparison, names, top, odds), json_path, quiet)
    if not quiet and json_path != "-":
        from rich.console import Console

        with standard_output():
            console = Console()
            console.print(_table(comparison, names, top, console, odds))
            console.print(_words(comparison, top, odds, why), highlight=False)


def _of_each(config: HeatConfig, against: str) -> tuple[HeatConfig, HeatConfig]:
    """The configuration of each of two variants.

    What one of them cuts and the other does not (to windows, to the last layers) stays a matter of
    the one: `--window 80` beside full and win is how win cuts, and leaves full whole.
    """
    other, variants = config.replace(variant=against), (config.variant, against)
    for name in ("window", "layers"):
        cut = [name in PRESETS[variant] for variant in variants]
        whole: dict[str, Any] = {name: None}
        if cut == [True, False]:
            other = other.replace(**whole)
        elif cut == [False, True]:
            config = config.replace(**whole)
    return config, other


def _two(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    targets: tuple[str | None, str | None],
    configs: tuple[HeatConfig, HeatConfig],
    quiet: bool,
) -> tuple[Attribution, Attribution]:
    """The prompt with two configurations; without a second target both explain the first's."""
    from heat_fast.attributor import Attributor

    (first, second), (target, other) = configs, targets
    left = Attributor(model, tokenizer, first).attribute(prompt, target, progress=not quiet)
    own = left.target_ids if target is None else target
    chosen = own if other is None else other
    right = Attributor(model, tokenizer, second).attribute(prompt, chosen, progress=not quiet)
    return left, right


def _table(
    comparison: Comparison,
    names: tuple[str, str],
    top: int,
    console: Any,
    odds: list[float] | None,
) -> Table:
    """The leading tokens of both, each with its rank and score in the other."""
    from rich.table import Table
    from rich.text import Text

    from heat_fast.reading import number, visible
    from heat_fast.terminal import is_ascii

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    last = () if odds is None else ("log odds",)
    for column in ("pos", "token", "#", names[0], "#", names[1], *last):
        table.add_column(
            Text(column), justify="left" if column == "token" else "right", no_wrap=True
        )
    ascii_only = is_ascii(console)
    for index, ranks in _leading(comparison, top):
        cells = [str(index), visible(comparison.left.tokens[index], ascii_only)]
        for rank, result in zip(ranks, (comparison.left, comparison.right), strict=True):
            cells += [str(rank), number(result.scores[index].item())]
        if odds is not None:
            cells.append(f"{odds[index]:+.2f}")
        table.add_row(*map(Text, cells))
    return table


def _log_odds(comparison: Comparison) -> tuple[list[float] | None, str | None]:
    """`Comparison.log_odds_drop` where the targets differ, and why it cannot be told."""
    if comparison.same_targets():
        return None, None
    try:
        return list(comparison.log_odds_drop().tolist()), None
    except InputError as error:
        return None, str(error)


def _leading(comparison: Comparison, top: int) -> list[tuple[int, tuple[int, int]]]:
    """Tokens that lead in either, by their better rank: index and ranks from 1."""
    orders = [
        {row.index: rank for rank, row in enumerate(each.top(len(each)), start=1)}
        for each in (comparison.left, comparison.right)
    ]
    ranks = {index: (orders[0][index], orders[1][index]) for index in orders[0]}
    leading = [(index, pair) for index, pair in ranks.items() if min(pair) <= top]
    return sorted(leading, key=lambda each: (min(each[1]), max(each[1]), each[0]))


def _words(comparison: Comparison, top: int, odds: list[float] | None, why: str | None) -> str:
    told = ", ".join(
        f"{name} {'-' if value is None else f'{value:.3f}'}"
        for name, value in comparison.correlations.items()
    )
    text = f"\nrank correlation (Spearman): {told}\n"
    text += f"leading {min(top, len(comparison.left))} tokens in common: "
    text += f"{comparison.overlap(top):.0%}"
    if not comparison.same_targets():
        text += "\nthe targets differ: " + " and ".join(
            repr(text_of(each.target_tokens)) for each in (comparison.left, comparison.right)
        )
        if odds is None:
            text += f"\nno log odds of the targets: {why}"
        else:
            text += (
                "\nlog odds: what masking the token takes from log P(first) / P(second), in nats; "
                "above 0 it speaks for the first"
            )
    return text


def _values(
    comparison: Comparison, names: tuple[str, str], top: int, odds: list[float] | None
) -> dict[str, Any]:
    return {
        "left": names[0],
        "right": names[1],
        "same_targets": comparison.same_targets(),
        "rank_correlation": dict(comparison.correlations),
        "overlap": {"k": min(top, len(comparison.left)), "share": comparison.overlap(top)},
        "leading": [
            {
                "index": index,
                "token": comparison.left.tokens[index],
                "ranks": list(ranks),
                "scores": [
                    each.scores[index].item() for each in (comparison.left, comparison.right)
                ],
                **({} if odds is None else {"log_odds_drop": odds[index]}),
            }
            for index, ranks in _leading(comparison, top)
        ],
    }
