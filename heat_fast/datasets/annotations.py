"""What several annotators marked: what they agree on, and how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from heat_fast.datasets.example import Span, tokens_in
from heat_fast.datasets.rows import PathLike, file_rows
from heat_fast.datasets.text import common, merge
from heat_fast.errors import InputError

# For the id of an example, the half-open ranges of characters that somebody marked.
Annotations = Mapping[str, Sequence[Span]]


def read_annotations(path: PathLike) -> dict[str, tuple[Span, ...]]:
    """One annotator's marks: rows `{"id": "...", "spans": [[start, stop], ...]}`.

    `spans` count characters of the marked text, half-open. An example with no mark has an empty
    list. Raises InputError for rows without these fields, empty or negative spans, and an id that
    comes twice.
    """
    found: dict[str, tuple[Span, ...]] = {}
    for number, row in enumerate(file_rows(path), start=1):
        name, spans = row.get("id"), row.get("spans")
        if name is None or not isinstance(spans, (list, tuple)):
            raise InputError(
                f"row {number} of {str(path)!r} has the fields {sorted(row)}: expected id and "
                "spans, a list of [start, stop]. Add them."
            )
        if str(name) in found:
            raise InputError(
                f"row {number} of {str(path)!r} repeats the id {name!r}: expected one row per "
                "example. Join its spans in one row."
            )
        for span in spans:
            whole = isinstance(span, (list, tuple)) and all(type(place) is int for place in span)
            if not whole or len(span) != 2 or not 0 <= span[0] < span[1]:
                raise InputError(
                    f"row {number} of {str(path)!r} has the span {span!r}: expected [start, stop] "
                    "with 0 <= start < stop. Correct it."
                )
        found[str(name)] = merge((start, stop) for start, stop in spans)
    return found


def intersection(*annotators: Annotations) -> dict[str, tuple[Span, ...]]:
    """The characters that every annotator marked, for the examples that every one saw.

    The HEAT paper intersects tokens; of characters that everybody marked, the tokens that hold one
    (:func:`tokens_in`) are the same, unless two annotators mark different parts of one token.

    Raises InputError where there is no annotator, or no example that all of them saw.

    >>> intersection({"1": [(0, 5), (8, 9)]}, {"1": [(3, 9)], "2": [(0, 1)]})
    {'1': ((3, 5), (8, 9))}
    """
    shared = _shared(*annotators)
    found = {name: merge(annotators[0][name]) for name in shared}
    for other in annotators[1:]:
        found = {name: common(found[name], other[name]) for name in shared}
    return found


class Agreement(NamedTuple):
    """Token-level F1 and Cohen's kappa, means over examples."""

    f1: float
    kappa: float


def agreement(
    first: Annotations, second: Annotations, offsets: Mapping[str, Sequence[Span]]
) -> Agreement:
    """How far two annotators mark the same tokens.

        F1 = 2 |A n B| / (|A| + |B|),   kappa = (p - e) / (1 - e)

    with A and B the tokens each marked, p the share of tokens on which both decide alike and e the
    share expected by chance of their two rates (Cohen 1960). Each is taken example by example and
    then averaged, as in the HEAT paper (0.91 and 0.89 there). Where nobody marked anything F1 is 1;
    where chance alone explains all, kappa is 1.

    offsets: for each id, the characters of each token of the marked text.

    Raises InputError where no example was seen by both, or one has no tokens.

    >>> words = [(0, 3), (4, 7), (8, 11), (12, 15)]
    >>> agreement({"1": [(0, 7)]}, {"1": [(4, 11)]}, {"1": words})
    Agreement(f1=0.5, kappa=0.0)
    """
    shared = _shared(first, second)
    pairs = []
    for name in shared:
        tokens = offsets.get(name, ())
        if not tokens:
            raise InputError(
                f"example {name!r} has no tokens: expected the characters of each token of its "
                "text. Add it to offsets."
            )
        one, other = set(tokens_in(tokens, first[name])), set(tokens_in(tokens, second[name]))
        pairs.append(_agree(one, other, len(tokens)))
    f1, kappa = (sum(column) / len(shared) for column in zip(*pairs, strict=True))
    return Agreement(f1, kappa)


def _agree(one: set[int], other: set[int], count: int) -> tuple[float, float]:
    f1 = 2 * len(one & other) / (len(one) + len(other)) if one or other else 1.0
    observed = 1 - len(one ^ other) / count
    rate, rival = len(one) / count, len(other) / count
    chance = rate * rival + (1 - rate) * (1 - rival)
    return f1, (observed - chance) / (1 - chance) if chance < 1 else 1.0


def _shared(*annotators: Annotations) -> list[str]:
    shared = [name for name in (annotators or ({},))[0] if all(name in it for it in annotators)]
    if not shared:
        raise InputError(
            f"{len(annotators)} annotators share no example: expected at least one annotator and "
            "an id that all of them have. Check that their ids are those of the same set."
        )
    return shared
