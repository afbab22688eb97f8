"""Generated examples whose evidence is known by construction."""

from __future__ import annotations

from typing import Any

from heat_fast.checks import check_whole
from heat_fast.datasets.example import Example, Span
from heat_fast.demo import corpus
from heat_fast.demo.corpus import Split, make_example, make_restatement
from heat_fast.errors import InputError


def synthetic(count: int, seed: int = 0, split: Split = "held_out") -> list[Example]:
    """Examples of the embedded model's own generator, of the seeds `seed` to `seed + count - 1`.

    Evidence: relation, entity and answer in the fact that bears the answer; support: the sentence
    of that fact; distractor: the narrative and the facts that compete with it, which share its
    relation or its entity. All of the passage is thus support or distractor.

    `extra` has question and answer, and the prompt in two other forms. "swapped": the answer and
    that of the fact of the same relation have changed places, so that `target` is now the other's.
    "rephrased": the sentences in the reverse order, which leaves the answer as it is; `spans` pairs
    a piece of the prompt with its place there. Both are `{"prompt": ..., "target": ...}`.

    split: "held_out", "validation" or "train", by what the embedded model has seen.

    Raises InputError for a count or seed that is no whole number or negative, and an unknown split.

    >>> [example] = synthetic(1)
    >>> example.target.strip() in example.texts("evidence")
    True
    """
    numbers = _numbers(count, seed, split)
    found = []
    for number in numbers:
        made = make_example(number, split)
        start, stop = made.question
        extra = {
            "question": made.prompt[start:stop],
            "answer": made.answer.strip(),
            "swapped": _swapped(made),
            "rephrased": _rephrased(made),
        }
        found.append(_example(f"synthetic-{split}-{number}", made, extra))
    return found


def restated(count: int, seed: int = 0, split: Split = "held_out") -> list[Example]:
    """Passages whose target is a whole sentence: the fact of `synthetic` in other words.

    Evidence, support and distractor as there; nothing is asked, and `extra` is empty. For the
    attribution of several target tokens. Raises InputError as `synthetic` does.

    >>> [example] = restated(1)
    >>> all(text in example.target for text in example.texts("evidence"))
    True
    """
    numbers = _numbers(count, seed, split)
    return [
        _example(f"restated-{split}-{number}", make_restatement(number, split), {})
        for number in numbers
    ]


def _example(name: str, made: corpus.Example, extra: dict[str, Any]) -> Example:
    return Example(
        name,
        made.prompt,
        made.answer,
        evidence=made.evidence,
        distractor=tuple(sorted((*made.distractor, *made.competing))),
        support=(made.fact,),
        extra=extra,
    )


def _numbers(count: int, seed: int, split: str) -> range:
    """The seeds of so many examples, after checking the arguments."""
    first = check_whole("seed", seed, 0)
    numbers = range(first, first + check_whole("count", count, 0))
    if split not in ("train", "validation", "held_out"):
        raise InputError(
            f"split is {split!r}: expected 'held_out', 'validation' or 'train'. Choose one of them."
        )
    return numbers


def _swapped(made: corpus.Example) -> dict[str, Any]:
    (start, stop), (other, end) = sorted((made.stated, made.rival))
    text = made.prompt
    moved = text[:start] + text[other:end] + text[stop:other] + text[start:stop] + text[end:]
    return {"prompt": moved, "target": " " + text[slice(*made.rival)]}


def _rephrased(made: corpus.Example) -> dict[str, Any]:
    text, spans = "", []
    passage: list[Span] = sorted((*made.distractor, *made.competing, made.fact))
    for start, stop in reversed(passage):
        text += " " * bool(text)
        spans.append(((start, stop), (len(text), len(text) + stop - start)))
        text += made.prompt[start:stop]
    start = passage[-1][1]  # question and all after it
    spans.append(((start, len(made.prompt)), (len(text), len(text) + len(made.prompt) - start)))
    return {"prompt": text + made.prompt[start:], "target": made.answer, "spans": spans}
