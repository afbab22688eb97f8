"""Where sentences and answers lie in a text, in characters, and sets of such spans."""

from __future__ import annotations

import re
from collections.abc import Iterable

from heat_fast.datasets.example import Span

# The last word of a sentence with the mark and closing signs, space, and what can begin the next.
_END = re.compile(r"(?<!\w)(\w*[.!?][\"')\]]*)\s+(?=[\"'(\[]?[A-Z0-9•])")
# Words whose full stop ends no sentence: titles and single letters.
_OPEN = re.compile(r"(?:[A-Za-z]|Dr|Mr|Mrs|Ms|St|Jr|Sr|vs|No|Lt|Col|Gen|Capt|Prof)\.")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    >>> words("It's 5 km.")
    ['it', 's', '5', 'km']
    """
    return re.findall(r"\w+", text.lower())


def sentences(text: str) -> list[Span]:
    """The sentences of a text, by a plain rule for English: the same wherever it is run.

    >>> text = "Dr. Lee slept. Was it late? Yes."
    >>> [text[start:stop] for start, stop in sentences(text)]
    ['Dr. Lee slept.', 'Was it late?', 'Yes.']
    """
    ends = [found.end() for found in _END.finditer(text) if not _OPEN.fullmatch(found[1])]
    pieces = zip([0, *ends], [*ends, len(text)], strict=True)
    return [strip(text, piece) for piece in pieces if text[slice(*piece)].strip()]


def strip(text: str, span: Span) -> Span:
    """A span without the white space at its ends."""
    piece = text[slice(*span)]
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def occurrences(text: str, phrase: str) -> list[Span]:
    """Where a phrase stands in a text as whole words, in capitals or not.

    >>> occurrences("A leaf, leaflets. LEAF", "leaf")
    [(2, 6), (18, 22)]
    """
    if not phrase.strip():
        return []
    pattern = rf"(?<!\w){re.escape(phrase.strip())}(?!\w)"
    return [found.span() for found in re.finditer(pattern, text, re.IGNORECASE)]


def answer_span(text: str, answer: str, question: str) -> tuple[Span, ...]:
    """The occurrence of an answer whose sentence shares most words with the question, if any.

    The paper resolves several occurrences by "lexical cues from the question"; of equal ones this
    is the first.

    >>> answer_span("Ice melts. Ice is cold water.", "ice", "What is cold?")
    ((11, 14),)
    """
    found = occurrences(text, answer)
    if not found:
        return ()
    asked = set(words(question))

    def shared(span: Span) -> int:
        around = (each for each in sentences(text) if each[0] <= span[0] < each[1])
        return sum(len(asked & set(words(text[start:stop]))) for start, stop in around)

    return (max(found, key=shared),)


def merge(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same characters as spans in order that neither overlap nor touch.

    >>> merge([(5, 8), (0, 2), (2, 3), (6, 7)])
    ((0, 3), (5, 8))
    """
    found: list[Span] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def common(left: Iterable[Span], right: Iterable[Span]) -> tuple[Span, ...]:
    """The characters that lie in both.

    >>> common([(0, 4), (6, 9)], [(2, 7)])
    ((2, 4), (6, 7))
    """
    others = merge(right)
    return merge(
        (max(start, begin), min(stop, end)) for start, stop in merge(left) for begin, end in others
    )


def shift(spans: Iterable[Span], by: int) -> tuple[Span, ...]:
    """The spans of a text that has moved."""
    return tuple((start + by, stop + by) for start, stop in spans)
