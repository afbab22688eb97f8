"""The embedded model and its generator: determinism, spans, disjoint splits, accuracy, size."""

from __future__ import annotations

import re
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import heat_fast
from heat_fast.demo import (
    WEIGHTS,
    Demo,
    Example,
    load_demo_model,
    load_files,
    make_example,
    make_restatement,
    tokens_in_spans,
)
from heat_fast.demo.corpus import Difficulty, lexicon, make_document, split_of
from heat_fast.demo.train import accuracy, train_tokenizer
from heat_fast.demo.words import ENTITIES, NAMES, RELATIONS, THINGS

SEEDS = range(200)
PINNED_START = "Two riders passed the forest without a word."
PINNED_FACT = ("Mirmora", "mountain", " Fenston")


@pytest.fixture(scope="module")
def embedded() -> Demo:
    return load_demo_model(300)


def piece(text: str, span: tuple[int, int]) -> str:
    return text[span[0] : span[1]]


def test_same_seed_same_example_and_other_seed_other_example() -> None:
    first = [make_example(seed) for seed in SEEDS]
    assert first == [make_example(seed) for seed in SEEDS]
    assert len({example.prompt for example in first}) == len(SEEDS)
    assert make_example(0, "held_out") != make_example(0, "validation")


def test_generator_is_pinned() -> None:
    # A changed generator would silently change what the shipped weights are evaluated on.
    example = make_example(0)
    assert example.prompt.startswith(PINNED_START)
    assert (example.entity, example.relation, example.answer) == PINNED_FACT


def test_spans_point_at_the_right_text() -> None:
    for seed in SEEDS:
        example = make_example(seed)
        prompt, answer = example.prompt, example.answer.strip()
        texts = [piece(prompt, span) for span in example.evidence]
        assert sorted(texts) == sorted([example.entity, example.relation, answer])
        assert texts[-1] == answer
        fact = piece(prompt, example.fact)
        assert fact.endswith(".")
        assert fact.count(".") == 1
        for start, end in example.evidence:
            assert example.fact[0] <= start < end <= example.fact[1]
        question = piece(prompt, example.question)
        assert question.endswith("?")
        assert example.entity in question
        assert example.relation in question
        assert prompt.endswith(f"{question}\nAnswer:")


def test_a_restatement_is_the_fact_in_other_words() -> None:
    example = make_restatement(3)
    assert example == make_restatement(3)
    assert example.prompt.endswith(".") and "Question" not in example.prompt
    texts = [piece(example.prompt, span) for span in example.evidence]
    assert set(texts) >= {example.entity, example.relation}
    assert example.answer[0] == " " and all(text in example.answer for text in texts)
    assert piece(example.prompt, example.question) == ""


def test_answer_can_only_be_read_from_the_asked_fact() -> None:
    for seed in SEEDS:
        example = make_example(seed)
        answer = example.answer.strip()
        assert len(re.findall(rf"\b{answer}\b", example.prompt)) == 1
        competing = [piece(example.prompt, span) for span in example.competing]
        assert any(example.relation in text and example.entity not in text for text in competing)
        assert any(example.entity in text and example.relation not in text for text in competing)
        for text in competing:
            assert not (example.entity in text and example.relation in text)


def test_parts_cover_the_passage_without_overlap() -> None:
    for seed in SEEDS:
        example = make_example(seed)
        passage = example.prompt.index("\nQuestion:")
        parts = sorted([example.fact, *example.competing, *example.distractor])
        assert parts[0][0] == 0
        assert parts[-1][1] == passage
        for (_, end), (start, _) in pairwise(parts):
            assert start == end + 1
            assert example.prompt[end] == " "


def test_facts_and_narrative_come_in_varied_order() -> None:
    examples = [make_example(seed) for seed in SEEDS]
    assert any(example.distractor[0][0] == 0 for example in examples)
    assert any(example.fact[0] == 0 for example in examples)
    assert any(len(example.distractor) >= 3 for example in examples)
    last = {max(example.fact, *example.competing) == example.fact for example in examples}
    assert last == {True, False}


def test_splits_are_disjoint() -> None:
    for seed in SEEDS:
        for split in ("validation", "held_out"):
            example = make_example(seed, split)
            triple = (example.entity, example.relation, example.answer.strip())
            assert split_of(*triple) == split
    sentence = re.compile(r"[^.?\n]*(?:[.?\n]|$)")
    seen = 0
    for seed in SEEDS:
        document = make_document(seed, questions=5)
        assert len(document.asked) == 5
        for text in sentence.findall(document.text.split("\nQuestion:")[0]):
            found = [
                [word for word in pool if re.search(rf"\b{word}\b", text)]
                for pool in (ENTITIES, tuple(RELATIONS), NAMES + THINGS)
            ]
            if found[0]:
                assert [len(words) for words in found] == [1, 1, 1], text
                assert split_of(found[0][0], found[1][0], found[2][0]) == "train"
                seen += 1
    assert seen >= 3 * len(SEEDS)


def test_training_answers_are_where_the_document_says() -> None:
    for seed in SEEDS:
        document = make_document(seed, questions=3)
        for mention in document.asked:
            start, end = mention.span
            assert document.text[:start].endswith("\nAnswer:")
            question = document.text[:start].rsplit("\nQuestion:", 1)[1]
            assert mention.entity in question
            assert mention.relation in question
            facts = [
                fact
                for fact in document.stated
                if (fact.entity, fact.relation) == (mention.entity, mention.relation)
            ]
            assert len(facts) == 1
            assert piece(document.text, facts[0].span) == document.text[start:end]


def test_difficulty_is_respected() -> None:
    easy = make_example(0, difficulty=Difficulty(sentences=(0, 0), facts=(3, 3)))
    assert easy.distractor == ()
    assert len(easy.competing) == 2


def test_unknown_word_has_no_split() -> None:
    with pytest.raises(ValueError, match="Atlantis"):
        split_of("Atlantis", "capital", NAMES[0])


def test_generator_words_and_answers_are_single_tokens(embedded: Demo) -> None:
    words = list(lexicon())
    lengths = {
        word: len(embedded.tokenizer.encode(word, add_special_tokens=False)) for word in words
    }
    assert [word for word, length in lengths.items() if length != 1] == []
    for example in embedded.examples:
        prompt = embedded.tokenizer(example.prompt).input_ids
        both = embedded.tokenizer(example.prompt + example.answer).input_ids
        assert both[:-1] == prompt


def test_offsets_round_trip(embedded: Demo) -> None:
    for example in embedded.examples[:50]:
        encoded = embedded.tokenizer(example.prompt, return_offsets_mapping=True)
        ids, offsets = encoded.input_ids, encoded.offset_mapping
        assert ids[0] == embedded.tokenizer.bos_token_id
        assert offsets[0] == (0, 0)
        assert "".join(piece(example.prompt, span) for span in offsets[1:]) == example.prompt
        for index, span in zip(ids[1:], offsets[1:], strict=True):
            assert embedded.tokenizer.decode([index]) == piece(example.prompt, span)
        evidence = tokens_in_spans(offsets, example.evidence)
        texts = [piece(example.prompt, offsets[index]).strip() for index in evidence]
        assert texts == [piece(example.prompt, span) for span in example.evidence]


@pytest.mark.parametrize("text", ["naïve café №7", "日本語 🙂", "\ttabs\r\n  and  spaces "])
def test_any_text_survives_the_tokenizer(embedded: Demo, text: str) -> None:
    ids = embedded.tokenizer(text).input_ids
    assert max(ids) < embedded.model.config.vocab_size
    assert embedded.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_what_its_script_trains(embedded: Demo, tmp_path: Path) -> None:
    again = train_tokenizer(tmp_path)
    assert again.get_vocab() == embedded.tokenizer.get_vocab()


def test_held_out_accuracy(embedded: Demo) -> None:
    # A wrong pairing of prompts and answers must not pass: the measure itself is checked too.
    right = accuracy(embedded.model, embedded.tokenizer, embedded.examples)
    assert right >= 0.99
    moved = [
        Example(**{**vars(example), "answer": other.answer})
        for example, other in pairwise(embedded.examples)
    ]
    assert accuracy(embedded.model, embedded.tokenizer, moved) < 0.1


def test_model_needs_entity_and_relation(embedded: Demo) -> None:
    """Swapping the asked entity for the competing one moves the answer to the competing fact."""
    followed = 0
    examples = embedded.examples[:100]
    for example in examples:
        rival = next(
            text
            for text in (piece(example.prompt, span) for span in example.competing)
            if example.relation in text and example.entity not in text
        )
        entity = next(word for word in ENTITIES if word in rival)
        answer = next(word for word in NAMES + THINGS if re.search(rf"\b{word}\b", rival))
        start, end = example.question
        question = piece(example.prompt, example.question).replace(example.entity, entity)
        prompt = example.prompt[:start] + question + example.prompt[end:]
        ids = embedded.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            best = int(embedded.model(ids).logits[0, -1].argmax())
        followed += embedded.tokenizer.decode([best]) == f" {answer}"
    assert followed >= 97


def test_prompts_fit_the_model(embedded: Demo) -> None:
    lengths = [len(embedded.tokenizer(example.prompt).input_ids) for example in embedded.examples]
    assert min(lengths) > 50
    assert max(lengths) < embedded.model.config.max_position_embeddings


def test_weights_are_small_and_float32(embedded: Demo) -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 5_000_000
    assert {weight.dtype for weight in embedded.model.parameters()} == {torch.float32}
    assert not embedded.model.training


def test_loading_touches_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the demo model opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load_demo_model()
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_files(tmp_path)


def test_the_number_of_examples_is_asked_for() -> None:
    assert heat_fast.load_demo_model(2).examples == load_demo_model().examples[:2]
    with pytest.raises(ValueError, match="-1"):
        load_demo_model(-1)
