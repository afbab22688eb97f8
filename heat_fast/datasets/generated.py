"""Generated examples whose evidence is known by construction."""

from __future__ import annotations

from heat_fast.datasets.example import Example
from heat_fast.demo.corpus import Split, make_example
from heat_fast.errors import InputError


def synthetic(count: int, seed: int = 0, split: Split = "held_out") -> list[Example]:
    """Examples of the embedded model's own generator, of the seeds `seed` to `seed + count - 1`.

    Evidence: relation, entity and answer in the fact that bears the answer; support: the sentence
    of that fact; distractor: the narrative and the facts that compete with it, which share its
    relation or its entity. All of the passage is thus support or distractor.

    split: "held_out", "validation" or "train", by what the embedded model has seen.

    Raises InputError for a negative count or seed and an unknown split.

    >>> [example] = synthetic(1)
    >>> example.target.strip() in example.texts("evidence")
    True
    """
    if count < 0 or seed < 0:
        raise InputError(
            f"count is {count} and seed {seed}: expected whole numbers of at least 0. Raise them."
        )
    if split not in ("train", "validation", "held_out"):
        raise InputError(
            f"split is {split!r}: expected 'held_out', 'validation' or 'train'. Choose one of them."
        )
    found = []
    for number in range(seed, seed + count):
        made = make_example(number, split)
        start, stop = made.question
        found.append(
            Example(
                f"synthetic-{split}-{number}",
                made.prompt,
                made.answer,
                evidence=made.evidence,
                distractor=tuple(sorted((*made.distractor, *made.competing))),
                support=(made.fact,),
                extra={"question": made.prompt[start:stop], "answer": made.answer.strip()},
            )
        )
    return found
