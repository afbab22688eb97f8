"""How well scores agree with annotated evidence. No model is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from heat_fast.checks import check_whole
from heat_fast.errors import InputError
from heat_fast.metrics._estimate import (
    Measurement,
    check_indices,
    check_pairs,
    check_vector,
    leading,
)

Tokens = Sequence[int]


def dsa(
    scores: Sequence[Any],
    evidence: Sequence[Tokens],
    first: Sequence[Tokens],
    second: Sequence[Tokens],
    *,
    seed: int = 0,
) -> Measurement:
    """Dependent sentence attribution: mass on the evidence less mass on the distractor.

        DSA = sum_{i in evidence} a_i - sum_{j in first} a_j,   a = scores / sum over first + second

    (HEAT paper, DSA metric). From -1 to 1, higher is better. For each example `scores [N]`, not
    negative, and indices of tokens: `first`, the distracting segment; `second`, the segment that
    bears the answer; `evidence`, a part of `second`. The paper sums over tokens "selected by the
    model" in one place and over segments in another: here it is all of `first`. Scores outside
    both segments (the question) count nowhere. `seed`: of the bootstrap.

    Raises `InputError` for scores that are negative, not finite or all 0 on the segments, for
    empty segments, segments that share tokens, and evidence outside the second.

    >>> dsa([[1, 1, 5, 3, 9]], [[2]], [[0, 1]], [[2, 3]]).value
    0.3
    """
    check_pairs(scores=scores, evidence=evidence, first=first, second=second)
    found = []
    for number, (row, gold, left, right) in enumerate(
        zip(scores, evidence, first, second, strict=True)
    ):
        values = check_vector(row, f"example {number}", least=0)
        one = check_indices(left, len(values), f"first segment of example {number}")
        other = check_indices(right, len(values), f"second segment of example {number}")
        chosen = check_indices(gold, len(values), f"evidence of example {number}")
        if set(one) & set(other):
            raise InputError(
                f"the segments of example {number} share tokens {sorted(set(one) & set(other))}: "
                "expected two separate ones. Give each token to one segment."
            )
        if not set(chosen) <= set(other):
            raise InputError(
                f"evidence {sorted(set(chosen) - set(other))} of example {number} lies outside the "
                "second segment: expected a part of it. Widen the segment, or correct the evidence."
            )
        total = float(values[one].sum() + values[other].sum())
        if total == 0:
            raise InputError(
                f"all scores on the segments of example {number} are 0: expected some mass to "
                "share out. Leave the example out."
            )
        found.append(float(values[chosen].sum() - values[one].sum()) / total)
    return Measurement.of(found, seed=seed)


def token_f1(
    scores: Sequence[Any], evidence: Sequence[Tokens], *, k: int | None = None, seed: int = 0
) -> Measurement:
    """F1 between the leading tokens and the annotated ones.

        F1 = 2 |A n B| / (|A| + |B|),   A the k leading tokens, B the evidence

    (HEAT paper Eq. 21). From 0 to 1, higher is better. For each example `scores [N]`, of either
    sign, and the indices of its evidence. The paper does not say how many tokens lead: `k=None`
    takes as many as the evidence has. Of equal scores the earlier token leads. `seed`: of the
    bootstrap. Raises `InputError` for scores that are not finite and for empty evidence.

    >>> token_f1([[0.1, 0.9, 0.8, 0.0]], [[1, 3]]).value
    0.5
    """
    return _overlaps(scores, evidence, k, seed).f1


class SpanScores(NamedTuple):
    """Precision, recall and F1 over the same examples."""

    precision: Measurement
    recall: Measurement
    f1: Measurement


def span_scores(
    scores: Sequence[Any],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    k: int = 10,
    seed: int = 0,
) -> SpanScores:
    """Precision, recall and F1 of the k leading tokens against spans of evidence.

        precision = |A n B| / |A|,   recall = |A n B| / |B|,   F1 their harmonic mean

    with A the k leading tokens (all, where there are fewer) and B the tokens of the spans (HEAT
    paper, sentence-level attribution; k = 10 there). From 0 to 1, higher is better. For each
    example `scores [N]`, of either sign, and half-open ranges of tokens. F1 is taken example by
    example and then averaged. `seed`: of the bootstrap. Raises `InputError` for scores that are
    not finite, for spans that are empty or lie outside, and where there is no span.

    >>> found = span_scores([[0.1, 0.9, 0.8, 0.0]], [[(1, 2)]], k=2)
    >>> found.precision.value, found.recall.value
    (0.5, 1.0)
    """
    check_whole("k", k)
    check_pairs(scores=scores, spans=spans)
    evidence = []
    for number, ranges in enumerate(spans):
        for start, stop in ranges:
            if not start < stop:
                raise InputError(
                    f"span ({start}, {stop}) of example {number} is empty: expected a half-open "
                    "range of tokens. Pass (start, stop) with start below stop."
                )
        evidence.append([token for start, stop in ranges for token in range(start, stop)])
    return _overlaps(scores, evidence, k, seed)


def _overlaps(
    scores: Sequence[Any], evidence: Sequence[Tokens], k: int | None, seed: int
) -> SpanScores:
    if k is not None:
        check_whole("k", k)
    check_pairs(scores=scores, evidence=evidence)
    found: list[tuple[float, float, float]] = []
    for number, (row, gold) in enumerate(zip(scores, evidence, strict=True)):
        values = check_vector(row, f"example {number}")
        chosen = set(check_indices(gold, len(values), f"evidence of example {number}"))
        top = set(leading(values, k or len(chosen)))
        both = len(top & chosen)
        found.append((both / len(top), both / len(chosen), 2 * both / (len(top) + len(chosen))))
    return SpanScores(*(Measurement.of(column, seed=seed) for column in zip(*found, strict=True)))
