"""Evidence by word statistics alone: a check of labels that no neural network had a part in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from heat_fast.checks import check_whole
from heat_fast.datasets.example import Example, Span
from heat_fast.datasets.text import sentences, shift, words
from heat_fast.errors import InputError


def bm25(
    documents: Sequence[Sequence[str]], query: Sequence[str], *, k1: float = 1.5, b: float = 0.75
) -> list[float]:
    """How well each document answers a query, by Okapi BM25.

        score(d) = sum_t idf(t) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
        idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5))

    over the different words t of the query, with f the count of t in d, N the number of documents
    and n of those that hold t (Robertson and Zaragoza 2009; the 1 in the logarithm is Lucene's and
    keeps idf positive). Documents and query are lists of words.

    Raises InputError where no document has a word.

    >>> [round(score, 3) for score in bm25([["a", "b"], ["b", "c"]], ["a"])]
    [0.693, 0.0]
    """
    mean = sum(map(len, documents)) / max(1, len(documents))
    if mean == 0:
        raise InputError(
            f"{len(documents)} documents hold no word: expected at least one. Leave the example "
            "out."
        )
    counts = [Counter(document) for document in documents]
    scores = [0.0] * len(documents)
    for term in dict.fromkeys(query):
        having = sum(term in count for count in counts)
        idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        for number, count in enumerate(counts):
            length = k1 * (1 - b + b * len(documents[number]) / mean)
            scores[number] += idf * count[term] * (k1 + 1) / (count[term] + length)
    return scores


def bm25_evidence(example: Example, *, count: int = 1) -> tuple[Span, ...]:
    """The sentences of an example's support that BM25 ranks highest for its question.

    At most `count`, in the order of the text; of equal ones the earlier; none that shares no word
    with the question. Raises InputError where the example has no support or no question.

    >>> text = "Snow is cold. The sun is a star."
    >>> prompt, asked = f"{text} What is a star?", {"question": "What is a star?"}
    >>> example = Example("1", prompt, " The sun", support=((0, len(text)),), extra=asked)
    >>> [prompt[start:stop] for start, stop in bm25_evidence(example)]
    ['The sun is a star.']
    """
    question = example.extra.get("question")
    if not example.support or not question:
        raise InputError(
            f"example {example.id!r} has no support or no question: expected both to rank "
            "sentences. Use a set that has them: sciq(), narrativeqa(), tellmewhy(), curated()."
        )
    check_whole("count", count)
    spans = [
        span
        for start, stop in example.support
        for span in shift(sentences(example.prompt[start:stop]), start)
    ]
    scores = bm25([words(example.prompt[slice(*span)]) for span in spans], words(question))
    order = sorted(range(len(spans)), key=lambda number: -scores[number])[:count]
    return tuple(spans[number] for number in sorted(order) if scores[number] > 0)
