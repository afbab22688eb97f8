"""Generated reading-comprehension prompts whose evidence is known by construction.

A prompt has the structure of the HEAT paper's curated set: a narrative distractor, made-up facts
and a question. One fact bears the answer. At least one other fact shares its relation and one
shares its entity, so neither alone finds the answer, and (entity, relation, answer) are paired at
random, so nothing can be memorised. Only the standard library is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Literal

from heat_fast.demo.words import (
    ENTITIES,
    FACTS,
    NAMES,
    NARRATIVE,
    PEOPLE,
    PLACES,
    QUESTIONS,
    RELATIONS,
    THINGS,
)

Span = tuple[int, int]
"""Half-open character range into a prompt."""

Split = Literal["train", "validation", "held_out"]
"""Which part of the (entity, relation, answer) space the asked fact comes from."""

_BUCKETS = 10


@dataclass(frozen=True)
class Difficulty:
    """How large and how varied a generated passage is.

    The defaults are the published task; smaller values serve the training curriculum.

    Attributes:
        sentences: least and largest number of narrative sentences.
        facts: least and largest number of facts.
        templates: how many of the fact and question templates are used, from the first on.
    """

    sentences: tuple[int, int] = (3, 8)
    facts: tuple[int, int] = (3, 5)
    templates: int = max(len(FACTS), len(QUESTIONS))


@dataclass(frozen=True)
class Example:
    """One prompt with its answer and the character spans of its parts.

    All spans are half-open and index ``prompt``. ``answer`` starts with a space: ``prompt +
    answer`` is the text a perfect reader writes.

    Attributes:
        seed: the number the example was generated from.
        split: ``"validation"`` or ``"held_out"`` (or ``"train"``).
        prompt: passage, question and ``Answer:``; the next token is the answer.
        answer: the answer with its leading space, a single token of the demo tokenizer; of a
            restatement the whole sentence.
        entity: the invented country the question asks about.
        relation: what the question asks about it.
        evidence: spans of the relation, the entity and the answer in the answer-bearing fact, in
            order of appearance.
        fact: span of the answer-bearing sentence.
        competing: spans of the other facts.
        distractor: spans of the narrative, one per unbroken run of sentences.
        question: span of the question sentence.
        stated: span of the answer in the answer-bearing fact.
        rival: span of the answer in the fact of the same relation, about another entity.

    Example:
        >>> from heat_fast.demo.corpus import make_example
        >>> example = make_example(0)
        >>> start, end = example.evidence[-1]
        >>> example.prompt[start:end] == example.answer.strip()
        True
    """

    seed: int
    split: Split
    prompt: str
    answer: str
    entity: str
    relation: str
    evidence: tuple[Span, ...]
    fact: Span
    competing: tuple[Span, ...]
    distractor: tuple[Span, ...]
    question: Span
    stated: Span
    rival: Span


@dataclass(frozen=True)
class Mention:
    """An answer in a training text and what it is the answer to.

    ``span`` is half-open and includes the leading space, so it is the answer's token.
    """

    span: Span
    entity: str
    relation: str


@dataclass(frozen=True)
class Document:
    """Training text: a passage and several answered questions.

    ``stated`` are the answers in the facts of the passage. ``asked`` are the answers after it, in
    order: the places where only the passage can tell what comes next.
    """

    text: str
    stated: tuple[Mention, ...]
    asked: tuple[Mention, ...]


@dataclass(frozen=True)
class _Fact:
    entity: str
    relation: str
    answer: str
    article: str


@dataclass
class _Writer:
    """Grows a text and reports where each piece went."""

    text: str = ""

    def write(self, piece: str) -> Span:
        start = len(self.text)
        self.text += piece
        return start, len(self.text)

    def fill(self, template: str, slots: dict[str, str]) -> dict[str, Span]:
        spans: dict[str, Span] = {}
        for literal, slot, _, _ in Formatter().parse(template):
            self.write(literal)
            if slot is not None:
                spans[slot] = self.write(slots[slot])
        return spans


@dataclass
class _Passage:
    """A written passage: the text so far and the spans of its facts and its narrative."""

    writer: _Writer
    facts: list[_Fact]
    templates: int
    slots: dict[_Fact, dict[str, Span]] = field(default_factory=dict)
    sentences: dict[_Fact, Span] = field(default_factory=dict)
    distractor: list[Span] = field(default_factory=list)


def split_of(entity: str, relation: str, answer: str) -> Split:
    """The split that owns a fact: a fixed partition of all (entity, relation, answer) triples.

    One triple in ten is validation, one in ten is held out, the rest is training. No training
    text ever states a triple of another split, so an answer on those cannot be recalled.

    Raises:
        ValueError: a word that is not in the generator's lists.
    """
    answers = NAMES if answer in NAMES else THINGS
    place = 0
    for word, words, factor in (
        (entity, ENTITIES, 1),
        (relation, RELATIONS, 3),
        (answer, answers, 1),
    ):
        if word not in words:
            raise ValueError(f"{word!r} is not a word of the generator; see heat_fast.demo.words")
        place += factor * tuple(words).index(word)
    bucket = place % _BUCKETS
    if bucket == 0:
        return "validation"
    return "held_out" if bucket == 1 else "train"


def make_example(
    seed: int, split: Split = "held_out", difficulty: Difficulty | None = None
) -> Example:
    """The example of one seed: the same text for the same arguments, on every machine.

    The random stream is keyed by the split and the seed, and the asked triple always belongs to
    ``split`` (see :func:`split_of`).

    Example:
        >>> from heat_fast.demo.corpus import make_example
        >>> make_example(3) == make_example(3)
        True
        >>> make_example(3).prompt.endswith("Answer:")
        True
    """
    rng = random.Random(f"{split}/{seed}")
    passage = _write_passage(rng, split, difficulty or Difficulty())
    asked = passage.facts[0]
    question = _ask(rng, passage.writer, asked, passage.templates)
    return _example(passage, seed, split, passage.writer.text, f" {asked.answer}", question)


def _example(
    passage: _Passage, seed: int, split: Split, prompt: str, answer: str, question: Span
) -> Example:
    """The example whose answer the first fact of a passage bears."""
    asked = passage.facts[0]
    slots = passage.slots[asked]
    return Example(
        seed=seed,
        split=split,
        prompt=prompt,
        answer=answer,
        entity=asked.entity,
        relation=asked.relation,
        evidence=tuple(sorted(slots[name] for name in ("entity", "relation", "answer"))),
        fact=passage.sentences[asked],
        competing=tuple(sorted(passage.sentences[fact] for fact in passage.facts[1:])),
        distractor=tuple(passage.distractor),
        question=question,
        stated=slots["answer"],
        rival=passage.slots[passage.facts[1]]["answer"],
    )


def make_restatement(seed: int, split: Split = "held_out") -> Example:
    """A passage alone, its answer a whole sentence: the answer-bearing fact in other words.

    The model has been trained to go on like that. `question` is empty; the rest is as in
    :func:`make_example`, from a random stream of its own.

    Example:
        >>> from heat_fast.demo.corpus import make_restatement
        >>> example = make_restatement(0)
        >>> all(word in example.answer for word in (example.entity, example.relation))
        True
    """
    rng = random.Random(f"restated/{split}/{seed}")
    passage = _write_passage(rng, split, Difficulty())
    end = len(passage.writer.text)
    passage.writer.write(" ")
    _write_fact(rng, passage.writer, passage.facts[0], passage.templates)
    text = passage.writer.text
    return _example(passage, seed, split, text[:end], text[end:], (end, end))


def make_document(
    seed: int, difficulty: Difficulty | None = None, questions: int = 1, restatements: int = 0
) -> Document:
    """Training text of one seed: a passage followed by ``questions`` answered questions.

    Every fact in it belongs to the training split. Asking several facts of one passage trains the
    look-up several times for one reading. A fact may be asked twice: otherwise the last answers
    could be guessed as those not given yet. ``restatements`` of the facts end the passage: the
    easiest form of the look-up, because a fact and its restatement are worded alike.

    Example:
        >>> from heat_fast.demo.corpus import make_document
        >>> document = make_document(0, questions=2)
        >>> len(document.asked)
        2
    """
    rng = random.Random(f"train/{seed}")
    passage = _write_passage(rng, "train", difficulty or Difficulty())
    writer = passage.writer

    def mention(fact: _Fact, answer: Span) -> Mention:
        return Mention((answer[0] - 1, answer[1]), fact.entity, fact.relation)

    stated = [mention(fact, passage.slots[fact]["answer"]) for fact in passage.facts]
    asked: list[Mention] = []
    for fact in rng.choices(passage.facts, k=restatements):
        writer.write(" ")
        slots = _write_fact(rng, writer, fact, passage.templates)
        asked.append(mention(fact, slots["answer"]))
    for fact in rng.choices(passage.facts, k=questions):
        _ask(rng, writer, fact, passage.templates)
        writer.write(" ")
        asked.append(mention(fact, writer.write(fact.answer)))
    return Document(writer.text, tuple(stated), tuple(asked))


def tokens_in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> tuple[int, ...]:
    """Indices of the tokens that overlap any of the character spans.

    Tokens with an empty offset, such as a beginning-of-sequence token, overlap nothing.

    Example:
        >>> from heat_fast.demo.corpus import tokens_in_spans
        >>> tokens_in_spans([(0, 0), (0, 3), (3, 7)], [(4, 7)])
        (2,)
    """
    return tuple(
        index
        for index, (start, end) in enumerate(offsets)
        if any(start < stop and begin < end and start < end for begin, stop in spans)
    )


def lexicon() -> Iterator[str]:
    """Every word of the generator as it stands in text, most with a leading space.

    Words that can open a passage come without the space as well. Read by the tokenizer's trainer.
    """
    pools = (ENTITIES, NAMES, THINGS, PEOPLE, PLACES, tuple(RELATIONS))
    words = {word for pool in pools for word in pool}
    openers = set(PEOPLE)
    for template in (*NARRATIVE, *FACTS, *QUESTIONS):
        literal = re.sub(r"\{\w+\}", " ", template)
        words.update(re.findall(r"\w+", literal))
        if first := re.match(r"\w+", template):
            openers.add(first.group())
    yield from sorted(f" {word}" for word in words | {"the"})
    yield from sorted(openers | {"Question", "Answer"})


def _write_passage(rng: random.Random, split: Split, difficulty: Difficulty) -> _Passage:
    facts = _draw_facts(rng, split, rng.randint(*difficulty.facts))
    narrative = _draw_narrative(rng, facts, rng.randint(*difficulty.sentences))
    order = list(facts)
    rng.shuffle(order)

    passage = _Passage(_Writer(), facts, difficulty.templates)
    for piece in _arrange(rng, narrative, order):
        if passage.writer.text:
            passage.writer.write(" ")
        if isinstance(piece, _Fact):
            begin = len(passage.writer.text)
            passage.slots[piece] = _write_fact(rng, passage.writer, piece, passage.templates)
            passage.sentences[piece] = (begin, len(passage.writer.text))
            continue
        start, end = passage.writer.write(piece)
        if passage.distractor and passage.distractor[-1][1] == start - 1:
            passage.distractor[-1] = (passage.distractor[-1][0], end)
        else:
            passage.distractor.append((start, end))
    return passage


def _write_fact(
    rng: random.Random, writer: _Writer, fact: _Fact, templates: int
) -> dict[str, Span]:
    slots = {
        "entity": fact.entity,
        "relation": fact.relation,
        "answer": fact.answer,
        "article": fact.article,
    }
    return writer.fill(rng.choice(FACTS[:templates]), slots)


def _draw_facts(rng: random.Random, split: Split, count: int) -> list[_Fact]:
    """The asked fact, one of its relation, one of its entity, then others; answers all differ."""
    first, second, third = rng.sample(ENTITIES, 3)
    relation = rng.choice(tuple(RELATIONS))
    alike = [name for name in RELATIONS if RELATIONS[name] == RELATIONS[relation]]
    other = rng.choice([name for name in alike if name != relation])
    keys = [(first, relation), (second, relation), (first, other)]
    extra = [
        (entity, name)
        for entity in (first, second, third)
        for name in RELATIONS
        if (entity, name) not in keys
    ]
    keys = (keys + rng.sample(extra, max(0, count - len(keys))))[:count]

    facts: list[_Fact] = []
    taken: set[str] = set()
    for position, (entity, name) in enumerate(keys):
        # Training passages stay inside the training triples altogether; elsewhere only the asked
        # fact has to be new.
        wanted = split if position == 0 or split == "train" else None
        while True:
            answer = rng.choice(NAMES if RELATIONS[name] == "name" else THINGS)
            fits = wanted is None or split_of(entity, name, answer) == wanted
            if fits and answer not in taken:
                break
        taken.add(answer)
        facts.append(_Fact(entity, name, answer, "" if RELATIONS[name] == "name" else "the "))
    return facts


def _draw_narrative(rng: random.Random, facts: Sequence[_Fact], count: int) -> list[str]:
    """Sentences about two people; things that answer one of the facts do not occur in them."""
    hero, friend = rng.sample(PEOPLE, 2)
    answers = {fact.answer for fact in facts}
    free = [thing for thing in THINGS if thing not in answers]
    sentences: list[str] = []
    for template in rng.sample(NARRATIVE, count):
        thing, second = rng.sample(free, 2)
        place, far = rng.sample(PLACES, 2)
        slots = {
            "hero": hero,
            "friend": friend,
            "thing": thing,
            "second": second,
            "place": place,
            "far": far,
        }
        sentences.append(template.format(**slots))
    return sentences


def _arrange(rng: random.Random, narrative: list[str], facts: list[_Fact]) -> list[str | _Fact]:
    """Facts after, before, inside or scattered through the narrative."""
    layout = rng.choice(("after", "before", "inside", "scattered"))
    if layout == "after":
        return [*narrative, *facts]
    if layout == "before":
        return [*facts, *narrative]
    if layout == "inside":
        cut = rng.randint(0, len(narrative))
        return [*narrative[:cut], *facts, *narrative[cut:]]
    pieces: list[str | _Fact] = [*narrative]
    for fact in facts:
        pieces.insert(rng.randint(0, len(pieces)), fact)
    return pieces


def _ask(rng: random.Random, writer: _Writer, fact: _Fact, templates: int) -> Span:
    writer.write("\nQuestion: ")
    start = len(writer.text)
    writer.fill(
        rng.choice(QUESTIONS[:templates]), {"entity": fact.entity, "relation": fact.relation}
    )
    end = len(writer.text)
    writer.write("\nAnswer:")
    return start, end
