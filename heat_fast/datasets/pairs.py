"""The curated set of the HEAT paper: a narrative that does not matter, a passage that does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from heat_fast.checks import check_whole
from heat_fast.datasets.example import Example, Span
from heat_fast.datasets.text import merge, occurrences, shift
from heat_fast.errors import InputError


def curated(
    narratives: Sequence[str],
    questions: Sequence[Example],
    annotations: Mapping[str, Sequence[Span]] | None = None,
    *,
    count: int | None = None,
    separator: str = " <s> ",
    ending: str = "",
    seed: int = 0,
) -> list[Example]:
    """Pairs of a narrative and a science question, as the HEAT paper builds its 2,000.

        prompt = narrative <s> support <s> Question: question

    Distractor: the narrative; support: the passage; evidence: the answer in it, widened by the
    annotations of that question. The target is the answer; the paper explains its first token
    (:func:`encode` gives it).

    narratives: segments, as :func:`narratives` reads them.
    questions: examples of :func:`sciq`; one whose support lacks the answer is left out, as in the
        paper.
    annotations: for ids of questions, spans of their support (not of the prompt) that bear the
        answer, as :func:`intersection` gives them.
    count: how many; by default one per question. Every question is used before one is used again,
        then with another narrative.
    separator: between the parts. Tokenizers that have a token "<s>" read it as that token.
    ending: what follows the question; nothing in the paper, "\\nAnswer:" helps small models.
    seed: of the pairing.

    A narrative that contains the answer is not paired with it: the passage alone is to bear it.

    Raises InputError for questions that are no such examples, annotated spans outside the support,
    and where there are fewer pairs than `count`.

    >>> from heat_fast.datasets.public import reading
    >>> asked = reading("q", "Snow is white.", "Which colour is snow?", "white", ((8, 13),))
    >>> [example] = curated(["Tom went home."], [asked])
    >>> example.prompt
    'Tom went home. <s> Snow is white. <s> Question: Which colour is snow?'
    >>> example.texts("evidence"), example.texts("distractor"), example.target
    (['white'], ['Tom went home.'], ' white')
    """
    usable = [each for each in questions if each.evidence]
    stories = [each.strip() for each in narratives if each.strip()]
    wanted = len(usable) if count is None else check_whole("count", count, 0)
    marked = annotations or {}
    found: list[Example] = []
    for question, story in _pairs(usable, stories, seed):
        if len(found) >= wanted:
            break
        found.append(
            _join(question, story, marked.get(question.id, ()), separator, ending, len(found))
        )
    if len(found) < wanted or not found:
        raise InputError(
            f"{len(stories)} narratives and {len(usable)} questions with the answer in their "
            f"support make {len(found)} pairs: expected {wanted or 'some'}. Give more of them, or "
            "a smaller count."
        )
    return found


def _pairs(
    questions: list[Example], stories: list[str], seed: int
) -> Iterator[tuple[Example, str]]:
    """Every pair once; each question before any comes again, and the stories in turn."""
    draw = random.Random(seed)
    questions = draw.sample(questions, len(questions))
    stories = draw.sample(stories, len(stories))
    for step in range(len(stories)):
        for place, question in enumerate(questions):
            story = stories[(place + step) % len(stories)]
            if not occurrences(story, _asked(question)[1]):
                yield question, story


def _asked(example: Example) -> tuple[str, str]:
    question, answer = example.extra.get("question"), example.extra.get("answer")
    if not question or not answer or len(example.support) != 1:
        raise InputError(
            f"example {example.id!r} has no question, answer or support: expected an example of "
            "sciq(). Load the questions with it."
        )
    return question, answer


def _join(
    question: Example,
    story: str,
    marked: Sequence[Span],
    separator: str,
    ending: str,
    number: int,
) -> Example:
    asked, answer = _asked(question)
    [(start, stop)] = question.support
    support = question.prompt[start:stop]
    for span in marked:
        if not 0 <= span[0] < span[1] <= len(support):
            raise InputError(
                f"an annotation of {question.id!r} is {tuple(span)}: expected 0 <= start < stop <= "
                f"{len(support)}, characters of its support. Correct the span."
            )
    begin = len(story + separator)
    evidence = merge([*shift(question.evidence, begin - start), *shift(marked, begin)])
    return Example(
        f"curated-{number}",
        f"{story}{separator}{support}{separator}Question: {asked}{ending}",
        f" {answer}",
        evidence=evidence,
        distractor=((0, len(story)),),
        support=((begin, begin + len(support)),),
        extra={"question": asked, "answer": answer, "question_id": question.id},
    )
