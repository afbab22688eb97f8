"""A result as text on a terminal: the prompt coloured by score, and the numbers beneath it.

With colour, a token's background goes from pale yellow to dark brown in steps of equal perceived
lightness (distinguishable in every form of colour blindness), each with its own black or white
text, so that dark and light terminals show the same; negative scores go from pale to dark blue in
the same steps. Without colour (piped, or NO_COLOR) and on terminals of 16 colours, which cannot
show the steps, the tokens of the table are marked ``[rank|token]`` in the prompt instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from heat_fast.reading import (
    approximations,
    colour_step,
    escape,
    number,
    parts,
    pieces,
    visible,
)
from heat_fast.result import Attribution

__all__ = ["is_ascii", "print_result", "prompt_text", "render", "top_table"]

# Eight steps of OKLCH lightness from 0.96 to 0.40; the text colour is the one of higher contrast
# (at least 4.6 : 1 throughout).
_PALETTE: Final = (
    ("#fff2af", "black"),
    ("#fad278", "black"),
    ("#f0b047", "black"),
    ("#e28f22", "black"),
    ("#cc7216", "black"),
    ("#b05923", "white"),
    ("#8e462d", "white"),
    ("#693830", "white"),
)
_NEGATIVE_PALETTE: Final = (
    ("#e2f4ff", "black"),
    ("#aedfff", "black"),
    ("#75c7ff", "black"),
    ("#4dadf2", "black"),
    ("#3992d9", "black"),
    ("#2878c0", "white"),
    ("#215da8", "white"),
    ("#1b428f", "white"),
)


def _styles(palette: Sequence[tuple[str, str]]) -> tuple[Style, ...]:
    inks = {"black": "#000000", "white": "#ffffff"}
    return tuple(Style(color=inks[ink], bgcolor=paper) for paper, ink in palette)


_STYLES: Final = _styles(_PALETTE)
_NEGATIVE_STYLES: Final = _styles(_NEGATIVE_PALETTE)
#: The columns of components: their names here and in the result.
_COMPONENTS: Final = ("gate", "curvature", "information")
_BAR_WIDTH: Final = 10
_GAP: Final = 2  # between two columns
# A token column that is not shortened below this where another column could go instead.
_TOKEN_WIDTH: Final = 12
_SHORTEST_TOKEN: Final = 6
_TARGETS_SHOWN: Final = 12
_DRIVERS_SHOWN: Final = 3


def print_result(
    result: Attribution, console: Console | None = None, *, top: int = 10, special: bool = True
) -> None:
    """Print a result to `console`, by default standard output."""
    console = Console() if console is None else console
    console.print(render(result, console, top=top, special=special))


def render(
    result: Attribution, console: Console, *, top: int = 10, special: bool = True
) -> RenderableType:
    """The whole view of a result as one rich renderable, for the abilities of `console`.

    `special=False` leaves special and template tokens out of the ranking, not out of the prompt.
    """
    colour = _has_colour(console)
    ascii_only = is_ascii(console)
    return Group(
        prompt_text(result, colour=colour, ascii_only=ascii_only, top=top, special=special),
        Text(),
        _legend(colour, signed=bool((result.scores < 0).any())),
        Text(),
        top_table(
            result,
            top,
            colour=colour,
            ascii_only=ascii_only,
            width=console.width,
            special=special,
        ),
        _targets(result, ascii_only),
        *_target_rows(result, ascii_only, console.width, special),
        *_parts(result),
        *map(Text, approximations(result)),
        _facts(result),
    )


def prompt_text(
    result: Attribution,
    *,
    colour: bool = True,
    ascii_only: bool = False,
    top: int = 10,
    special: bool = True,
) -> Text:
    """The prompt as flowing text, each token coloured by its score (or marked by its rank)."""
    text = Text(overflow="fold")
    scores = result.scores.tolist()
    highest = max(map(abs, scores))
    ranks = {row.index: rank for rank, row in enumerate(result.top(top, special=special), start=1)}
    for piece in pieces(result):
        score = max((scores[index] for index in piece.tokens), key=abs, default=0.0)
        rank = min((ranks[index] for index in piece.tokens if index in ranks), default=None)
        ranked = rank is not None and not colour
        style = _style(score, highest) if colour else None
        shown = _flowing(piece.text, ascii_only, mark_spaces=ranked or style is not None)
        if ranked:
            body = shown.lstrip(" ")
            text.append(shown[: len(shown) - len(body)])
            # Line breaks stand as signs inside the mark and are made after it.
            line = body.replace("\n", "")
            text.append(f"[{rank}|{line}]", style="bold")
            text.append("\n" * (len(body) - len(line)))
        else:
            text.append(shown, style=style)
    return text


def top_table(
    result: Attribution,
    k: int = 10,
    *,
    colour: bool = True,
    ascii_only: bool = False,
    width: int = 80,
    special: bool = True,
) -> Table:
    """The tokens of `result.top(k)` with their score, its share and the measured components.

    Bars of negative scores are of another character. Information that screening left out is a dash.
    What does not fit into `width` columns is left out whole, the bar first, then the share, then
    components from the last; long tokens are shortened. A number is never cut.
    """
    rows = result.top(k, special=special)
    nothing = not bool(result.scores.any())
    highest = abs(rows[0].score) if rows else 0.0
    skipped = result.information_skipped or (False,) * len(result)

    def bar(score: float) -> str:
        filled = round(_BAR_WIDTH * abs(score) / highest) if highest > 0 else 0
        positive, negative = ("#", "-") if ascii_only else ("█", "░")
        return (negative if score < 0 else positive) * filled

    tokens = [visible(row.token, ascii_only) for row in rows]
    columns = {
        "#": [str(rank) for rank in range(1, len(rows) + 1)],
        "pos": [str(row.index) for row in rows],
        "token": tokens,
        "score": [number(row.score) for row in rows],
        "share": ["-" if nothing else f"{row.share:.1%}" for row in rows],
        "": [bar(row.score) for row in rows],
        "gate": [number(row.gate) for row in rows],
        "curvature": [number(row.curvature) for row in rows],
        "information": ["-" if skipped[row.index] else number(row.information) for row in rows],
    }
    for name in set(_COMPONENTS) - set(result.measured):
        del columns[name]
    token_width = _fit(columns, width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        left = name in ("token", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="crop")
    for index, row in enumerate(rows):
        style = _style(row.score, highest) if colour else None
        cells = {name: Text(column[index]) for name, column in columns.items()}
        token = _shorten(tokens[index], token_width, ascii_only)
        cells["token"] = Text(token, style=style or "")
        table.add_row(*cells.values())
    return table


def _fit(columns: dict[str, list[str]], width: int) -> int:
    """Leave out columns until the rest fits into `width`; returns the width of the tokens."""
    widths = {name: max(map(cell_len, (name, *cells))) for name, cells in columns.items()}
    longest = widths.pop("token")
    for name, token in (
        ("", _TOKEN_WIDTH),
        ("share", _TOKEN_WIDTH),
        ("information", _SHORTEST_TOKEN),
        ("curvature", _SHORTEST_TOKEN),
        ("gate", _SHORTEST_TOKEN),
    ):
        if _room(widths, width) >= min(longest, token):
            break
        if name in columns:
            del columns[name], widths[name]
    return max(min(longest, _room(widths, width)), _SHORTEST_TOKEN)


def _room(widths: dict[str, int], width: int) -> int:
    """What the other columns leave to the tokens."""
    return width - sum(widths.values()) - _GAP * len(widths)


def _shorten(text: str, width: int, ascii_only: bool) -> str:
    """At most `width` columns of a text, with dots where something is left out."""
    if cell_len(text) <= width:
        return text
    dots = ".." if ascii_only else "…"
    kept = ""
    for character in text:
        if cell_len(kept + character) > width - len(dots):
            break
        kept += character
    return kept + dots


# --- parts ----------------------------------------------------------------------------------------


def _legend(colour: bool, *, signed: bool) -> Text:
    if not colour:
        told = "; rank and share follow the magnitude of the score" if signed else ""
        return Text(f"[rank|token] marks the tokens of the table{told}.", style="italic")
    legend = Text("negative " if signed else "low ", style="italic")
    for style in (*reversed(_NEGATIVE_STYLES), *_STYLES) if signed else _STYLES:
        legend.append("  ", style=style)
    words = "positive (square root of the magnitude" if signed else "high (square root of the score"
    legend.append(f" {words}, relative to the highest)", style="italic")
    return legend


def _targets(result: Attribution, ascii_only: bool) -> Text:
    log_probs = result.target_log_probs.tolist()
    shown = list(zip(result.target_tokens, log_probs, strict=True))[:_TARGETS_SHOWN]
    text = Text("\nTarget " if len(log_probs) == 1 else "\nTargets ", style="")
    for position, (token, log_prob) in enumerate(shown):
        text.append(", " if position else "")
        text.append(visible(token, ascii_only), style="bold")
        text.append(f" (log-probability {number(log_prob)}" if len(log_probs) == 1 else " (")
        text.append(f", p = {math.exp(min(log_prob, 0.0)):.3g})" if len(log_probs) == 1 else "")
        text.append(f"{number(log_prob)})" if len(log_probs) > 1 else "")
    if len(log_probs) > len(shown):
        text.append(f", and {len(log_probs) - len(shown)} more")
    if len(log_probs) > 1:
        text.append(f"; log-probability of all {number(math.fsum(log_probs))}")
        text.append(f", scores aggregated by {result.aggregate}")
    return text


def _target_rows(
    result: Attribution, ascii_only: bool, width: int, special: bool
) -> list[RenderableType]:
    """Of a target of several tokens: what drives each of them, with its share of that score.

    The share of a negative score has a minus sign.
    """
    if len(result.target_ids) == 1:
        return []
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("target", no_wrap=True)
    table.add_column("driven by", no_wrap=True, overflow="ellipsis")
    rows = zip(result.target_tokens, result.target_scores, strict=True)
    for token, scores in list(rows)[:_TARGETS_SHOWN]:
        shares = result.shares(scores).tolist()
        drivers = []
        for index in result.ranking(scores, special=special)[:_DRIVERS_SHOWN]:
            share = math.copysign(shares[index], scores[index].item() + 0.0)
            name = _shorten(visible(result.tokens[index], ascii_only), width // 5, ascii_only)
            drivers.append(f"{name} {share:.0%}")
        target = _shorten(visible(token, ascii_only), width // 5, ascii_only)
        table.add_row(Text(target, style="bold"), Text(", ".join(drivers)))
    more = len(result.target_ids) - _TARGETS_SHOWN
    return [Text(), table, *([Text(f"and {more} more")] if more > 0 else [])]


def _parts(result: Attribution) -> list[Text]:
    """How the score divides over roles and segments, where the prompt has any."""
    return [Text(f"{name}: {shares}") for name, shares in parts(result)]


def _facts(result: Attribution) -> Text:
    metadata: Any = result.metadata
    seconds = metadata.get("seconds", {}).get("total")
    counts = metadata.get("counts", {})
    facts = [
        metadata.get("model"),
        f"method {result.method}"
        if result.method
        else f"variant {metadata.get('config', {}).get('variant', 'unknown')}",
        " ".join(str(metadata[key]) for key in ("device", "dtype") if key in metadata),
        None if seconds is None else f"{seconds:.2f} s",
        f"{counts['hvp']:,} HVPs" if "hvp" in counts else None,
        f"{counts['branch_tokens']:,} branch tokens" if "branch_tokens" in counts else None,
    ]
    return Text(escape(" | ".join(str(fact) for fact in facts if fact)), style="dim")


# --- small things ---------------------------------------------------------------------------------


def _has_colour(console: Console) -> bool:
    """Whether the palette can be told apart; the colours of a 16-colour terminal are its own."""
    return console.color_system in ("256", "truecolor") and not console.no_color


def is_ascii(console: Console) -> bool:
    """Whether a console can show nothing but ASCII."""
    return not console.encoding.lower().startswith("utf")


def _style(score: float, highest: float) -> Style | None:
    """The colours of a score, where it is strong enough for any."""
    level = colour_step(abs(score), highest, len(_STYLES))
    if level == 0:
        return None
    return (_NEGATIVE_STYLES if score < 0 else _STYLES)[level - 1]


def _flowing(text: str, ascii_only: bool, *, mark_spaces: bool) -> str:
    """A piece of the prompt as it reads, with its line breaks kept and made visible."""
    shown = escape(text, ascii_only)
    if mark_spaces and shown and not shown.strip(" "):
        shown = ("_" if ascii_only else "·") * len(shown)
    shown = re.sub(r"\t", r"\\t" if ascii_only else "⇥", shown)
    return re.sub(r"\n", r"\\n" + "\n" if ascii_only else "↵\n", shown)
