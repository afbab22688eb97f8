"""``heat-fast compare``: two results, or two variants on one prompt, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from heat_fast.checks import nearest
from heat_fast.cli import options
from heat_fast.cli.common import UsageError, check_places, standard_output, write_json
from heat_fast.cli.models import load_model
from heat_fast.cli.prompts import read_prompt
from heat_fast.cli.results import holds_many, read_result
from heat_fast.config import PRESETS, HeatConfig

if TYPE_CHECKING:
    from rich.table import Table

    from heat_fast.comparison import Comparison
    from heat_fast.result import Attribution


def compare(
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
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt of --against.")
    ] = None,
    prompt_file: options.PromptFile = None,
    messages: options.Messages = None,
    target: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to explain, of --against.")
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
    """
    check_places({"--json": json_path}, streams=("--json",))
    if against is None:
        if left is None or right is None:
            raise UsageError(
                "compare needs two saved results, or --against VARIANT and a prompt: expected "
                "heat-fast compare LEFT RIGHT. Give both."
            )
        if any(each is not None for each in (prompt, prompt_file, messages, target)):
            raise UsageError(
                "a prompt or target without --against: expected it beside saved results only with "
                "--against VARIANT. Leave it out, or give two variants instead of files."
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
                f"both {left!r} and --against: expected saved results, or two variants. Drop one."
            )
        if against not in PRESETS:
            raise UsageError(
                f"--against: unknown variant {against!r}: expected one of {', '.join(PRESETS)}. "
                + nearest(against, PRESETS)
            )
        other = config.replace(variant=against)
        text = read_prompt(prompt, prompt_file, messages, model)
        loaded = load_model(model, device, dtype, debug=debug)
        prompt_text = loaded.example if text is None else text
        pair = _two(loaded.model, loaded.tokenizer, prompt_text, target, (config, other), quiet)
        names = config.variant, against
    from heat_fast.comparison import compare_results

    comparison = compare_results(*pair)
    if json_path is not None:
        write_json(_values(comparison, names, top), json_path, quiet)
    if not quiet and json_path != "-":
        from rich.console import Console

        with standard_output():
            console = Console()
            console.print(_table(comparison, names, top, console))
            console.print(_words(comparison, top), highlight=False)


def _two(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: str | None,
    configs: tuple[HeatConfig, HeatConfig],
    quiet: bool,
) -> tuple[Attribution, Attribution]:
    """The prompt with two configurations; what the first explains, the second does too."""
    from heat_fast.attributor import Attributor

    first, second = configs
    left = Attributor(model, tokenizer, first).attribute(prompt, target, progress=not quiet)
    chosen = left.target_ids if target is None else target
    right = Attributor(model, tokenizer, second).attribute(prompt, chosen, progress=not quiet)
    return left, right


def _table(comparison: Comparison, names: tuple[str, str], top: int, console: Any) -> Table:
    """The leading tokens of both, each with its rank and score in the other."""
    from rich.table import Table
    from rich.text import Text

    from heat_fast.reading import number, visible
    from heat_fast.terminal import is_ascii

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("pos", "token", "#", names[0], "#", names[1]):
        table.add_column(
            Text(column), justify="left" if column == "token" else "right", no_wrap=True
        )
    ascii_only = is_ascii(console)
    for index, ranks in _leading(comparison, top):
        cells = [str(index), visible(comparison.left.tokens[index], ascii_only)]
        for rank, result in zip(ranks, (comparison.left, comparison.right), strict=True):
            cells += [str(rank), number(result.scores[index].item())]
        table.add_row(*map(Text, cells))
    return table


def _leading(comparison: Comparison, top: int) -> list[tuple[int, tuple[int, int]]]:
    """Tokens that lead in either, by their better rank: index and ranks from 1."""
    orders = [
        {row.index: rank for rank, row in enumerate(each.top(len(each)), start=1)}
        for each in (comparison.left, comparison.right)
    ]
    ranks = {index: (orders[0][index], orders[1][index]) for index in orders[0]}
    leading = [(index, pair) for index, pair in ranks.items() if min(pair) <= top]
    return sorted(leading, key=lambda each: (min(each[1]), max(each[1]), each[0]))


def _words(comparison: Comparison, top: int) -> str:
    told = ", ".join(
        f"{name} {'-' if value is None else f'{value:.3f}'}"
        for name, value in comparison.correlations.items()
    )
    text = f"\nrank correlation (Spearman): {told}\n"
    text += f"leading {min(top, len(comparison.left))} tokens in common: "
    text += f"{comparison.overlap(top):.0%}"
    if not comparison.same_targets():
        text += "\nthe targets differ: " + " and ".join(
            repr("".join(each.target_tokens)) for each in (comparison.left, comparison.right)
        )
    return text


def _values(comparison: Comparison, names: tuple[str, str], top: int) -> dict[str, Any]:
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
            }
            for index, ranks in _leading(comparison, top)
        ],
    }
