"""Stretches of a prompt and what they contributed together (paper Eq. 24).

    score(span) = sum_{i in span} score[i]

A span is a half-open range of tokens. Where it is given by characters, a sentence or a substring,
`heat_fast.locate` says which tokens belong to it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from heat_fast.checks import is_whole
from heat_fast.errors import InputError, MissingPackageError
from heat_fast.locate import (
    Range,
    TargetSpan,
    check_range,
    first_visible,
    known_positions,
    locate,
    named_ranges,
    occurrence_of,
    target_range,
    tokens_of,
)
from heat_fast.readable import text_of

if TYPE_CHECKING:
    from heat_fast.result import Attribution

__all__ = [
    "InputSpan",
    "Segment",
    "Span",
    "find_span",
    "named_segments",
    "outstanding",
    "roles",
    "sentences",
    "span_to_span",
    "words",
]


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of a prompt, with their sums over all targets.

    text: what they read; characters: the half-open range of it in the prompt's text, None where
    positions are not known. score: the sum of its tokens' scores; share: that of their shares
    (`Attribution.shares`), 0 to 1: of scores that have signs, which may cancel in the sum, the
    magnitudes count.
    """

    start: int
    stop: int
    text: str
    characters: Range | None
    score: float
    share: float
    gate: float
    curvature: float
    information: float
    name: str | None = None

    def __len__(self) -> int:
        return self.stop - self.start


_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(-([A-Za-z]{2}|[0-9]{3}))?")
#: A part of the prompt: its own text where that occurs once, a half-open range of characters, or a
#: span of :func:`find_span`.
Segment = str | Range | Span
InputSpan = Segment


# --- one span -------------------------------------------------------------------------------------


def find_span(
    result: Attribution,
    text: str | None = None,
    *,
    occurrence: int | None = None,
    characters: Range | None = None,
    tokens: Range | None = None,
    name: str | None = None,
) -> Span:
    """The span of a substring, of a range of characters or of a range of tokens (half-open).

    text: a part of the prompt's text; where it occurs more than once, `occurrence` says which (0 is
    the first, -1 the last). name: kept in the span.

    Raises InputError for a text that does not occur, or occurs more often without `occurrence`; for
    ranges that are empty or lie outside; where no token begins in the characters; where the
    positions of tokens are not known (ids, tokenizers without offsets) and are needed.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> prompt = "Maria slept. Henry ate."
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, prompt, probes=1)
    >>> find_span(result, "Henry ate").text
    ' Henry ate'
    """
    given = [each is not None for each in (text, characters, tokens)]
    if sum(given) != 1:
        raise InputError(
            f"{sum(given)} of text, characters and tokens were given: expected one of them, which "
            "says where the span lies."
        )
    if occurrence is not None and text is None:
        raise InputError("occurrence without text: expected the text that occurs. Pass it too.")
    if tokens is not None:
        return _span(result, check_range(tokens, len(result), "prompt tokens"), name)
    whole, offsets = known_positions(result.prompt_text, result.offsets)
    if text is not None:
        characters = occurrence_of(whole, text, occurrence, "the prompt")
    wanted = check_range(characters, len(whole), "characters")
    return _span(result, tokens_of(wanted, whole, offsets), name)


def _columns(result: Attribution) -> dict[str, list[float]]:
    """What is summed over the tokens of a span."""
    arrays = {"score": "target_scores"} | {
        name: name for name in ("gate", "curvature", "information")
    }
    sums = {name: result.aggregated(array).tolist() for name, array in arrays.items()}
    return sums | {"share": result.shares().tolist()}


def _span(
    result: Attribution,
    tokens: Range,
    name: str | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
) -> Span:
    """The span of these tokens; `columns` of the result, where many spans share them."""
    start, stop = tokens
    columns = _columns(result) if columns is None else columns
    values = {key: math.fsum(column[start:stop]) for key, column in columns.items()}
    characters, text = None, text_of(result.tokens[start:stop])
    if result.offsets is not None and result.prompt_text is not None:
        pieces = [pair for pair in result.offsets[start:stop] if pair[0] < pair[1]]
        if pieces:
            characters = pieces[0][0], pieces[-1][1]
            text = result.prompt_text[slice(*characters)]
    return Span(start, stop, text, characters, name=name, **values)


# --- several spans --------------------------------------------------------------------------------


def sentences(result: Attribution, language: str = "en") -> list[Span]:
    """The prompt's sentences, in order, split by the rules of a language.

    language: its ISO 639 code of two or three letters, with a region or without (`pt-BR`); one that
    there are no rules for is split by those of English.

    Every token that stands for characters belongs to one of them; white space and line breaks
    belong to the sentence before. A sentence in which no token begins is left out.

    Raises InputError where positions are not known or the language is no such code,
    MissingPackageError where sentencex is not installed (``pip install 'heat-fast[sentences]'``).

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> prompt = "Maria slept. Henry ate."
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, prompt, probes=1)
    >>> [sentence.text for sentence in sentences(result)]
    ['Maria slept.', ' Henry ate.']
    """
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise InputError(
            f"language={language!r}: expected an ISO 639 code of two or three lower-case letters, "
            "with a region or without, such as 'en' or 'pt-BR'. Pass one."
        )
    text, _ = known_positions(result.prompt_text, result.offsets)
    try:
        from sentencex import get_sentence_boundaries
    except ImportError as error:
        raise MissingPackageError.of(
            "sentencex",
            error,
            "to find sentences",
            "Install it with pip install 'heat-fast[sentences]', or name the parts with "
            "by_segment().",
        ) from error
    starts = [
        each["start_index"]
        for each in get_sentence_boundaries(language, text)
        if text[each["start_index"] : each["end_index"]].strip()
    ]
    return _from(result, starts)


def words(result: Attribution) -> list[Span]:
    """The prompt's words, in order, as Unicode's standard annex 29 separates them.

    Punctuation marks are words of their own, and so are most single characters of scripts written
    without spaces. A token is the smallest unit: one that stands for several words belongs to the
    first that is visible in it, and the others, in which no token begins, are left out. White space
    belongs to the word before.

    Raises InputError where positions are not known.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, "Maria slept.", probes=1)
    >>> [word.text for word in words(result)]
    ['Maria', ' slept', '.']
    """
    import regex

    text, _ = known_positions(result.prompt_text, result.offsets)
    boundaries = regex.finditer(r"(?w)\b(?=\S)", text)
    return _from(result, [each.start() for each in boundaries])


def _from(result: Attribution, starts: Sequence[int]) -> list[Span]:
    """The spans that begin at these characters, each up to the next; empty ones are left out."""
    text, offsets = known_positions(result.prompt_text, result.offsets)
    # What comes before the first goes to it.
    starts = [0, *starts[1:]]
    owned: list[list[int]] = [[] for _ in starts]
    for index, pair in enumerate(offsets):
        if pair[0] < pair[1]:
            place = first_visible(text, pair)
            owned[bisect_right(starts, place) - 1].append(index)
    columns = _columns(result)
    return [_span(result, (each[0], each[-1] + 1), columns=columns) for each in owned if each]


def roles(result: Attribution) -> list[Span]:
    """The stretches of a chat whose tokens are of one role, in order, each named by it.

    What the chat template wrote is left out, and separates them: a message is one stretch, unless
    the template writes something between its parts.

    Raises InputError where it is not known which tokens are whose: the prompt is no chat, or its
    template cannot be taken apart.
    """
    if result.roles is None:
        raise InputError(
            "it is not known which tokens are whose: expected a prompt of chat messages whose "
            "template keeps what they say. Name the parts with by_segment()."
        )
    found, start, columns = [], 0, _columns(result)
    for role, tokens in groupby(result.roles):
        stop = start + len(list(tokens))
        if role is not None:
            found.append(_span(result, (start, stop), role, columns))
        start = stop
    return found


def named_segments(
    result: Attribution, segments: Mapping[str, Segment] | None = None
) -> dict[str, Span]:
    """The named parts of a prompt: ``{"context": "...", "question": (120, 160)}``.

    A part is its text, where that occurs once; a half-open range of characters (of tokens, where
    the prompt was given as ids); or a span that :func:`find_span` gave. Parts may overlap; their
    shares then add up to more than they cover. None: the parts that :func:`heat_fast.attribute` was
    given with the prompt.

    Raises InputError as :func:`find_span` does, naming the segment; without segments where the
    prompt came with none.
    """
    if segments is not None:
        ranges = named_ranges(segments, lambda where: _locate(result, where))
    elif result.segments:
        ranges = result.segments
    else:
        raise InputError(
            "the prompt came without segments: expected some to name its parts. Pass them here, "
            "or as segments= to attribute()."
        )
    columns = _columns(result)
    return {name: _span(result, where, name, columns) for name, where in ranges.items()}


def _locate(result: Attribution, where: Segment) -> Range:
    if isinstance(where, Span):
        tokens = check_range((where.start, where.stop), len(result), "prompt tokens")
        if _span(result, tokens).text != where.text:
            raise InputError(
                "the span reads otherwise in this prompt: expected a span of the same prompt. Take "
                "it from this result, by span()."
            )
        return tokens
    return locate(where, result.prompt_text, result.offsets, len(result))


def outstanding(result: Attribution, k: int = 5) -> list[Span]:
    """The k stretches that stand out most from the prompt, highest first; they share no token.

    With the mean score as the level, these are the stretches whose sum of `score[i] - mean` cannot
    be raised by making them longer or shorter (all maximal scoring subsequences; Ruzzo and Tompa,
    1999), in the order of that sum. There may be fewer than k.

    Raises InputError for k below 1.
    """
    if not is_whole(k) or k < 1:
        raise InputError(f"top_spans({k!r}): expected a whole number of at least 1.")
    scores = result.scores.double()
    above = (scores - scores.mean()).tolist()
    found = _maximal(above)
    found.sort(key=lambda each: (-math.fsum(above[slice(*each)]), each))
    return [_span(result, each) for each in found[:k]]


def _maximal(values: Sequence[float]) -> list[Range]:
    """All maximal scoring subsequences, left to right (Ruzzo and Tompa, 1999).

    Candidates are kept with the running total before and after them. A new one is joined to the
    last that began lower, where none between ended as high; else it stands alone.
    """
    kept: list[tuple[int, int, float, float]] = []  # start, stop, total before, total after
    total = 0.0
    for index, value in enumerate(values):
        before, total = total, total + value
        if value <= 0:
            continue
        new = (index, index + 1, before, total)
        while True:
            lower = next((j for j in reversed(range(len(kept))) if kept[j][2] < new[2]), None)
            if lower is None or kept[lower][3] >= new[3]:
                break
            new = (kept[lower][0], new[1], kept[lower][2], new[3])
            del kept[lower:]
        kept.append(new)
    return [(start, stop) for start, stop, _, _ in kept]


# --- to a part of the target ----------------------------------------------------------------------


def span_to_span(
    result: Attribution, input_span: InputSpan, target_span: TargetSpan = None
) -> float:
    """What a stretch of the prompt contributed to a stretch of the target (paper Eq. 24).

        sum_{i in input_span} aggregate_{t in target_span} score[t, i]

    aggregated over these targets as the configuration says (Eq. 23). input_span: as in
    :func:`named_segments`; target_span: a part of the target's text that occurs once, a half-open
    range of target tokens, or None for the whole target.

    Raises InputError as :func:`find_span` does.
    """
    from heat_fast.combine import aggregate

    tokens = slice(*_locate(result, input_span))
    targets = slice(*target_range(result.target_tokens, target_span))
    return math.fsum(aggregate(result.target_scores[targets], result.aggregate)[tokens].tolist())
