"""Where a part of a prompt or of a target lies: from its text or its characters to its tokens.

A token belongs to the part that holds its first character that is not white space (its first
character, where all of them are). So `" Paris"` belongs to `"Paris"`, a line break to what it ends
up in, and neighbouring parts share no token and lose none. Tokens that the tokenizer added and that
stand for no characters belong to none.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heat_fast.checks import is_whole
from heat_fast.errors import InputError
from heat_fast.readable import joined

__all__ = [
    "Range",
    "TargetSpan",
    "check_range",
    "first_visible",
    "known_positions",
    "locate",
    "named_ranges",
    "occurrence_of",
    "target_range",
    "tokens_of",
]

#: Half-open, of characters or of tokens.
Range = tuple[int, int]
#: A part of the target: its own text where that occurs once, a half-open range of target tokens, or
#: None for all of it.
TargetSpan = str | Range | None

#: How an error shows a passage.
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def first_visible(text: str, pair: Range) -> int:
    """The first character of a range that is not white space, else its first: where it belongs."""
    piece = text[slice(*pair)]
    body = piece.lstrip()
    return pair[0] + (len(piece) - len(body) if body else 0)


def locate(
    where: str | Range, text: str | None, offsets: Sequence[Range] | None, count: int
) -> Range:
    """The tokens of a part of a prompt, half-open.

    where: its text, where that occurs once, with or without white space around it; or a range of
    characters; of a prompt that was given as ids (`text` is None), a range of its `count` tokens.
    offsets: the characters of each token, None where they are not known.

    Raises InputError for a text that does not occur, or occurs more than once; for ranges that are
    empty or lie outside; where no token begins in the characters; where positions are needed and
    not known; for anything else.

    >>> locate("red ball", "The red ball.", [(0, 3), (3, 7), (7, 12), (12, 13)], 4)
    (1, 3)
    """
    if not isinstance(where, str) and not (isinstance(where, Sequence) and len(where) == 2):
        raise InputError(
            f"{_SHORT.repr(where)} is no part of a prompt: expected some text of it, or its range "
            "(start, stop). Give one of them."
        )
    if text is None and not isinstance(where, str):
        return check_range(where, count, "prompt tokens")
    text, offsets = known_positions(text, offsets)
    if isinstance(where, str):
        # Chat templates trim what they are given, and white space belongs to what follows it.
        found = where if where in text else where.strip()
        where = occurrence_of(text, found, None, "the prompt")
    return tokens_of(check_range(where, len(text), "characters"), text, offsets)


def named_ranges(parts: Mapping[str, Any], find: Callable[[Any], Range]) -> dict[str, Range]:
    """What `find` says of each of some named parts.

    Raises InputError as `find` does, naming the part, and for anything but a mapping of some names.

    >>> named_ranges({"first": (0, 2)}, lambda where: locate(where, None, None, 5))
    {'first': (0, 2)}
    """
    if not isinstance(parts, Mapping) or not parts:
        raise InputError(
            f"segments is {_SHORT.repr(parts)}: expected a mapping of at least one name to a text "
            "or range. Name each part: {'first': ..., 'second': ...}."
        )
    found = {}
    for name, where in parts.items():
        if not isinstance(name, str) or not name:
            raise InputError(
                f"a segment's name is {_SHORT.repr(name)}: expected some text. Name it."
            )
        try:
            found[name] = find(where)
        except InputError as error:
            raise InputError(f"segment {_SHORT.repr(name)}: {error}") from error
    return found


def tokens_of(characters: Range, text: str, offsets: Sequence[Range]) -> Range:
    """The tokens that belong to a range of characters, half-open."""
    owned = [
        index
        for index, pair in enumerate(offsets)
        if pair[0] < pair[1] and characters[0] <= first_visible(text, pair) < characters[1]
    ]
    if owned:
        return owned[0], owned[-1] + 1
    shown = _SHORT.repr(text[slice(*characters)])
    raise InputError(
        f"no token begins in characters {characters[0]} to {characters[1]} ({shown}): expected "
        "the beginning of at least one, for a token belongs to where its first character lies. "
        "Widen the range."
    )


def known_positions(
    text: str | None, offsets: Sequence[Range] | None
) -> tuple[str, Sequence[Range]]:
    """A prompt's text and the characters of each token; InputError where they are not known."""
    if text is None or offsets is None:
        raise InputError(
            "the positions of the tokens in the text are not known: expected a prompt given as "
            "text or messages, and a tokenizer that reports positions (a fast one). Name tokens "
            "instead, by span(tokens=(start, stop)) of a result, or by ranges of a prompt of ids."
        )
    return text, offsets


def occurrence_of(text: str, part: str, occurrence: int | None, where: str) -> Range:
    """The range of one occurrence of a part of a text; occurrences do not overlap."""
    if not isinstance(part, str) or not part:
        raise InputError(
            f"the text looked for is {_SHORT.repr(part)}: expected some text of {where}. Leave it "
            "out, or give a range."
        )
    shown, starts = _SHORT.repr(part), []
    start = text.find(part)
    while start >= 0:
        starts.append(start)
        start = text.find(part, start + len(part))
    if not starts:
        raise InputError(
            f"{shown} does not occur in {where}: expected a part of its text, letter by letter (of "
            "a chat, as its template renders it). Copy it from there, or give a range."
        )
    if occurrence is None and len(starts) > 1:
        raise InputError(
            f"{shown} occurs {len(starts)} times in {where}: expected to know which. Give its "
            "range, (start, stop); span() takes occurrence=0 for the first as well."
        )
    try:
        start = starts[occurrence or 0]
    except (IndexError, TypeError) as error:
        raise InputError(
            f"occurrence={occurrence!r}, but {shown} occurs {len(starts)} times in {where}: "
            f"expected {-len(starts)} to {len(starts) - 1}."
        ) from error
    return start, start + len(part)


def check_range(value: Any, size: int, what: str) -> Range:
    """A half-open range inside `size` of something; InputError for any other."""
    try:
        start, stop = value
        whole = all(is_whole(each) for each in value)
    except (TypeError, ValueError):
        whole = False
    if not whole or not 0 <= start < stop <= size:
        raise InputError(
            f"{value!r} is no range of the {size} {what}: expected (start, stop) with 0 <= start < "
            f"stop <= {size}; stop itself is not part of it."
        )
    return int(start), int(stop)


def target_range(tokens: Sequence[str], where: TargetSpan) -> Range:
    """The half-open range of target tokens that a part of the target stands for."""
    if where is None:
        return 0, len(tokens)
    if not isinstance(where, str):
        return check_range(where, len(tokens), "target tokens")
    text, pairs = joined(tokens)
    characters = occurrence_of(text, where, None, "the target")
    owned = [
        index
        for index, pair in enumerate(pairs)
        if characters[0] <= first_visible(text, pair) < characters[1]
    ]
    if not owned:
        raise InputError(
            f"no token of the target begins in {where!r}: expected the beginning of at least one. "
            f"Take a longer part; the tokens are {list(tokens)}."
        )
    return owned[0], owned[-1] + 1
