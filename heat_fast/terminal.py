"""A result as text on a terminal: the prompt coloured by score, and the numbers beneath it.

With colour, a token's background goes from pale yellow to dark brown in steps of equal perceived
lightness (distinguishable in every form of colour blindness), each with its own black or white
text, so that dark and light terminals show the same. Without colour (piped, or NO_COLOR) and on
terminals of 16 colours, which cannot show the steps, the tokens of the table are marked
``[rank|token]`` in the prompt instead.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from heat_fast.result import Attribution

__all__ = ["is_ascii", "number", "print_result", "prompt_text", "render", "top_table", "visible"]

# Eight steps of OKLCH lightness from 0.96 to 0.40; the text colour is the one of higher contrast
# (at least 4.9 : 1 throughout).
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
_STYLES: Final = tuple(
    Style(color="#000000" if ink == "black" else "#ffffff", bgcolor=paper)
    for paper, ink in _PALETTE
)
_BAR_WIDTH: Final = 10
_GAP: Final = 2  # between two columns
# A token column that is not shortened below this where another column could go instead.
_TOKEN_WIDTH: Final = 12
_SHORTEST_TOKEN: Final = 6
_TARGETS_SHOWN: Final = 12
_DRIVERS_SHOWN: Final = 3
# Characters that reorder the text around them; harmless in a page, misleading in a terminal.
_BIDIRECTIONAL_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclasses.dataclass
class _Segment:
    """A stretch of the prompt that is shown as one: usually a token, at least a character."""

    text: str
    score: float | None = None
    rank: int | None = None

    def add(self, score: float, rank: int | None) -> None:
        self.score = score if self.score is None else max(self.score, score)
        if rank is not None:
            self.rank = rank if self.rank is None else min(self.rank, rank)


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
        _legend(colour, ascii_only),
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
        *_approximations(result),
        *_screening(result),
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
    highest = max(result.scores.tolist(), default=0.0)
    text = Text(overflow="fold")
    for segment in _segments(result, top, special):
        ranked = segment.rank is not None and not colour
        level = _level(segment.score or 0.0, highest) if colour else 0
        shown = _flowing(segment.text, ascii_only, mark_spaces=ranked or level > 0)
        if ranked:
            body = shown.lstrip(" ")
            text.append(shown[: len(shown) - len(body)])
            # Line breaks stand as signs inside the mark and are made after it.
            line = body.replace("\n", "")
            text.append(f"[{segment.rank}|{line}]", style="bold")
            text.append("\n" * (len(body) - len(line)))
        else:
            text.append(shown, style=_STYLES[level - 1] if level else None)
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
    """The k highest-scoring tokens with their score, its share of the total and components.

    Information that screening left out is a dash. What does not fit into `width` columns is left
    out whole, the bar first, then the share, then components from the last; long tokens are
    shortened. A number is never cut.
    """
    rows = result.top(k, special=special)
    total = math.fsum(result.scores.tolist())
    highest = rows[0].score if rows else 0.0
    skipped = result.information_skipped or (False,) * len(result)

    def bar(score: float) -> str:
        filled = round(_BAR_WIDTH * score / highest) if highest > 0 else 0
        return ("#" if ascii_only else "█") * filled

    tokens = [visible(row.token, ascii_only) for row in rows]
    columns = {
        "#": [str(rank) for rank in range(1, len(rows) + 1)],
        "pos": [str(row.index) for row in rows],
        "token": tokens,
        "score": [number(row.score) for row in rows],
        "share": [f"{row.score / total:.1%}" if total > 0 else "-" for row in rows],
        "": [bar(row.score) for row in rows],
        "gate": [number(row.gate) for row in rows],
        "curvature": [number(row.curvature) for row in rows],
        "information": ["-" if skipped[row.index] else number(row.information) for row in rows],
    }
    token_width = _fit(columns, width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        left = name in ("token", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="crop")
    for index, row in enumerate(rows):
        level = _level(row.score, highest) if colour else 0
        cells = {name: Text(column[index]) for name, column in columns.items()}
        token = _shorten(tokens[index], token_width, ascii_only)
        cells["token"] = Text(token, style=_STYLES[level - 1] if level else "")
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


def visible(token: str, ascii_only: bool = False) -> str:
    """A token on one line, its white space and control characters visible."""
    space, newline, tab = (" ", r"\n", r"\t") if ascii_only else ("·", "↵", "⇥")
    shown = _escape(token, ascii_only).replace("\n", newline).replace("\t", tab)
    body = shown.strip(" ")
    if not ascii_only:
        start = len(shown) - len(shown.lstrip(" "))
        return space * start + body + space * (len(shown) - start - len(body))
    # ASCII has no unobtrusive visible space, so quotes show where the token begins and ends.
    return f"'{shown}'" if body != shown or not body else shown


# --- parts ----------------------------------------------------------------------------------------


def _segments(result: Attribution, top: int, special: bool) -> list[_Segment]:
    scores = result.scores.tolist()
    ranks = {row.index: rank for rank, row in enumerate(result.top(top, special=special), start=1)}
    if result.offsets is None or result.prompt_text is None:
        return [
            _Segment(token, score, ranks.get(index))
            for index, (token, score) in enumerate(zip(result.tokens, scores, strict=True))
        ]
    segments: list[_Segment] = []
    done = 0
    last: _Segment | None = None
    for index, (start, end) in enumerate(result.offsets):
        if start == end:  # added by the tokenizer, not in the text
            segments.append(_Segment(result.tokens[index], scores[index], ranks.get(index)))
            continue
        if end <= done and last is not None:  # another piece of a character already shown
            last.add(scores[index], ranks.get(index))
            continue
        if start > done:
            segments.append(_Segment(result.prompt_text[done:start]))
        last = _Segment(result.prompt_text[max(start, done) : end])
        last.add(scores[index], ranks.get(index))
        segments.append(last)
        done = end
    segments.append(_Segment(result.prompt_text[done:]))
    return segments


def _legend(colour: bool, ascii_only: bool) -> Text:
    if not colour:
        return Text("[rank|token] marks the tokens of the table.", style="italic")
    legend = Text("low ", style="italic")
    for style in _STYLES:
        legend.append("  ", style=style)
    legend.append(" high (square root of the score, relative to the highest)", style="italic")
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
    """Of a target of several tokens: what drives each of them, with its share of that score."""
    if len(result.target_ids) == 1:
        return []
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("target", no_wrap=True)
    table.add_column("driven by", no_wrap=True, overflow="ellipsis")
    rows = zip(result.target_tokens, result.target_scores, strict=True)
    for token, scores in list(rows)[:_TARGETS_SHOWN]:
        total = math.fsum(scores.tolist())
        drivers = []
        for index in result.ranking(scores, special=special)[:_DRIVERS_SHOWN]:
            share = scores[index].item() / total if total > 0 else 0.0
            name = _shorten(visible(result.tokens[index], ascii_only), width // 5, ascii_only)
            drivers.append(f"{name} {share:.0%}")
        target = _shorten(visible(token, ascii_only), width // 5, ascii_only)
        table.add_row(Text(target, style="bold"), Text(", ".join(drivers)))
    more = len(result.target_ids) - _TARGETS_SHOWN
    return [Text(), table, *([Text(f"and {more} more")] if more > 0 else [])]


def _approximations(result: Attribution) -> list[Text]:
    """What was taken from a part of the model or of the prompt, where that was asked for."""
    metadata: Any = result.metadata
    lines = []
    if metadata.get("config", {}).get("layers") is not None and "layers" in metadata:
        used, of = metadata["layers"]["used"], metadata["layers"]["of"]
        lines.append(f"gate and curvature through the last {used} of {of} blocks")
    if "windows" in metadata:
        windows = metadata["windows"]
        count, leakage = len(windows["stretches"]), windows["leakage"]
        lines.append(
            f"{count} {'window' if count == 1 else 'windows'} of {windows['tokens']:,} tokens"
        )
        if leakage is not None:
            lines[-1] += f" (leakage {leakage:.1%}: how far windows disagree on what they share)"
    return [Text(line) for line in lines]


def _screening(result: Attribution) -> list[Text]:
    """What screening left out, one line for each kind that was asked for."""
    metadata: Any = result.metadata
    config, screening = metadata.get("config", {}), metadata.get("screening", {})
    lines = []
    if "coverage" in screening:
        facts = screening["coverage"]
        audit = facts["audit"]
        lines.append(
            f"information skipped for {facts['skipped']:,} of {facts['tokens']:,} tokens "
            f"(coverage {config.get('coverage')})"
        )
        if audit["tokens"]:
            lines[-1] += (
                f"; audit of {audit['tokens']}: at most "
                f"{number(audit['largest_information'])} nats, an estimated "
                f"{audit['score_share_lost']:.2%} of the score lost"
            )
    if "branch_tolerance" in screening:
        facts = screening["branch_tolerance"]
        audit, order = facts["audit"], facts["audit"]["rank_correlation"]
        lines.append(
            f"{facts['frozen'] / facts['rows']:.1%} of the branches' rows frozen "
            f"(tolerance {config.get('branch_tolerance')}); audit of {audit['branches']}: relative "
            f"error {audit['median_relative_error']:.2%} (median), "
            f"{audit['largest_relative_error']:.2%} (largest)"
            + ("" if order is None else f", rank correlation {order:.3f}")
        )
    return [Text(line) for line in lines]


def _facts(result: Attribution) -> Text:
    metadata: Any = result.metadata
    seconds = metadata.get("seconds", {}).get("total")
    counts = metadata.get("counts", {})
    facts = [
        metadata.get("model"),
        f"variant {metadata.get('config', {}).get('variant', 'unknown')}",
        " ".join(str(metadata[key]) for key in ("device", "dtype") if key in metadata),
        None if seconds is None else f"{seconds:.2f} s",
        f"{counts['hvp']:,} HVPs" if "hvp" in counts else None,
        f"{counts['branch_tokens']:,} branch tokens" if "branch_tokens" in counts else None,
    ]
    return Text(_escape(" | ".join(str(fact) for fact in facts if fact)), style="dim")


# --- small things ---------------------------------------------------------------------------------


def _has_colour(console: Console) -> bool:
    """Whether the palette can be told apart; the colours of a 16-colour terminal are its own."""
    return console.color_system in ("256", "truecolor") and not console.no_color


def is_ascii(console: Console) -> bool:
    """Whether a console can show nothing but ASCII."""
    return not console.encoding.lower().startswith("utf")


def _level(score: float, highest: float) -> int:
    """0 (no colour) to 8. The square root keeps middling scores visible beside a dominant one."""
    if highest <= 0 or score <= 0:
        return 0
    return round(len(_STYLES) * math.sqrt(score / highest))


def number(value: float) -> str:
    """Three significant digits, in plain notation where that stays short."""
    value += 0.0  # no negative zero
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def _escape(text: str, ascii_only: bool = False) -> str:
    """Control characters, lone surrogates and reordering marks as escapes; \\n and \\t stay."""
    escaped = "".join(
        character
        if character in "\n\t" or not _is_dangerous(character)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
    return escaped.encode("ascii", "backslashreplace").decode() if ascii_only else escaped


def _is_dangerous(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL_CONTROLS


def _flowing(text: str, ascii_only: bool, *, mark_spaces: bool) -> str:
    """A piece of the prompt as it reads, with its line breaks kept and made visible."""
    shown = _escape(text, ascii_only)
    if mark_spaces and shown and not shown.strip(" "):
        shown = ("_" if ascii_only else "·") * len(shown)
    shown = re.sub(r"\t", r"\\t" if ascii_only else "⇥", shown)
    return re.sub(r"\n", r"\\n" + "\n" if ascii_only else "↵\n", shown)
