"""What every view of a result says alike: the prompt in stretches, text made visible, caveats.

The terminal, the page and the notebook differ in how they draw; what they draw comes from here.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Iterable
from typing import Any, Final

from heat_fast.result import Attribution

__all__ = [
    "Piece",
    "approximations",
    "by_role",
    "by_segment",
    "colour_step",
    "escape",
    "number",
    "parts",
    "pieces",
    "shorten",
    "visible",
]

# Characters that reorder the text around them, and so mislead whoever reads it.
_BIDIRECTIONAL_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Of the shares in a line: how many, and how much of a name.
_NAMED: Final = 10
_NAME_LENGTH: Final = 40


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of the prompt that is shown as one: usually a token, at least a character.

    text: what stands there; tokens: the positions of the tokens it is made of. There are several
    where a tokenizer spells one character in pieces, and none for text between two tokens.
    """

    text: str
    tokens: tuple[int, ...] = ()


def pieces(result: Attribution) -> list[Piece]:
    """The prompt from beginning to end, every token in exactly one piece.

    Tokens that are not in the text (added by the tokenizer, or ids without a text) stand for
    themselves.
    """
    if result.offsets is None or result.prompt_text is None:
        return [Piece(token, (index,)) for index, token in enumerate(result.tokens)]
    found: list[Piece] = []
    done = 0
    last: int | None = None  # the piece that the next piece of a character belongs to
    for index, (start, end) in enumerate(result.offsets):
        if start == end:  # added by the tokenizer, not in the text
            found.append(Piece(result.tokens[index], (index,)))
            continue
        if end <= done and last is not None:  # another piece of a character already shown
            found[last] = Piece(found[last].text, (*found[last].tokens, index))
            continue
        if start > done:
            found.append(Piece(result.prompt_text[done:start]))
        last = len(found)
        found.append(Piece(result.prompt_text[max(start, done) : end], (index,)))
        done = end
    if done < len(result.prompt_text):
        found.append(Piece(result.prompt_text[done:]))
    return found


def colour_step(value: float, highest: float, steps: int) -> int:
    """0 (no colour) to `steps`. The square root keeps middling values visible beside a large one.

    >>> colour_step(0.25, 1.0, 8)
    4
    """
    if highest <= 0 or value <= 0:
        return 0
    return round(steps * math.sqrt(value / highest))


def by_role(result: Attribution) -> str | None:
    """Whose words the score is of in a chat, the largest share first; None for other prompts.

    >>> import dataclasses, heat_fast
    >>> demo = heat_fast.load_demo_model(1)
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, "Who?", curvature="none")
    >>> by_role(dataclasses.replace(result, roles=("user",) * len(result)))
    'user 100%'
    """
    if result.roles is None:
        return None
    shares: dict[str, float] = {}
    for role, share in zip(result.roles, result.shares().tolist(), strict=True):
        name = "chat template" if role is None else role
        shares[name] = shares.get(name, 0.0) + share
    return _ranked(shares.items())


def by_segment(result: Attribution) -> str | None:
    """Which of the parts that were named with the prompt the score is of, the largest share first.

    What lies in none of them is "elsewhere". None where no parts were named.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model(1)
    >>> result = heat_fast.attribute(
    ...     demo.model, demo.tokenizer, "Who?", curvature="none", segments={"question": "Who?"}
    ... )
    >>> by_segment(result)
    'question 100%, elsewhere 0%'
    """
    found, inside = result.segments, set[int]()
    if not found:
        return None
    shares = [(name, span.share) for name, span in result.by_segment().items()]
    for start, stop in found.values():
        inside.update(range(start, stop))
    if len(inside) < len(result):
        left = result.shares().tolist()
        shares.append(("elsewhere", sum(left[i] for i in range(len(result)) if i not in inside)))
    return _ranked(shares)


def parts(result: Attribution) -> list[tuple[str, str]]:
    """How the score divides over the roles of a chat and over named parts, where there are any."""
    known = {"Score by role": by_role(result), "Score by segment": by_segment(result)}
    return [(name, shares) for name, shares in known.items() if shares]


def _ranked(shares: Iterable[tuple[str, float]]) -> str:
    """The largest shares, by name."""
    ordered = sorted(shares, key=lambda each: -each[1])
    shown = [
        f"{shorten(visible(name), _NAME_LENGTH)} {share:.0%}" for name, share in ordered[:_NAMED]
    ]
    more = len(ordered) - _NAMED
    return ", ".join(shown + [f"and {more} more"] * (more > 0))


def shorten(text: str, length: int) -> str:
    """At most `length` characters of a text.

    >>> shorten("incomprehensible", 8)
    'incompr…'
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"


def number(value: float) -> str:
    """Three significant digits, in plain notation where that stays short.

    >>> number(0.0123456), number(12345.6), number(1e-7)
    ('0.0123', '12,346', '1.00e-07')
    """
    value += 0.0  # no negative zero
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"
    return f"{value:.2e}"


def escape(text: str, ascii_only: bool = False) -> str:
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


def visible(token: str, ascii_only: bool = False) -> str:
    """A token on one line, its white space and control characters visible."""
    space, newline, tab = (" ", r"\n", r"\t") if ascii_only else ("·", "↵", "⇥")
    shown = escape(token, ascii_only).replace("\n", newline).replace("\t", tab)
    body = shown.strip(" ")
    if not ascii_only:
        start = len(shown) - len(shown.lstrip(" "))
        return space * start + body + space * (len(shown) - start - len(body))
    # ASCII has no unobtrusive visible space, so quotes show where the token begins and ends.
    return f"'{shown}'" if body != shown or not body else shown


def approximations(result: Attribution) -> list[str]:
    """What was taken from a part of the model or of the prompt, where that was asked for.

    One line for each: the last blocks alone, windows, probes that were too few for the order that
    was asked for, and what screening left out.
    """
    return [*_parts(result), *_probes(result), *_screening(result)]


def _probes(result: Attribution) -> list[str]:
    taken: Any = result.metadata.get("probes", {})
    if taken.get("settled", True):
        return []
    return [f"{taken['most']} probes did not settle the order of the leading tokens"]


def _parts(result: Attribution) -> list[str]:
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
        if count > 1 and metadata.get("config", {}).get("window_weights") == "probability":
            lines[-1] += ", weighted by the probability of the target in each"
        if leakage is not None:
            lines[-1] += f" (leakage {leakage:.1%}: how far windows disagree on what they share)"
        if left_out := len(windows.get("not_swept", ())):
            lines.append(
                f"{left_out} of them left out, where the target is at most "
                f"{metadata['config']['window_tolerance']:g} times as probable as in the best"
            )
    return lines


def _screening(result: Attribution) -> list[str]:
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
    return lines
