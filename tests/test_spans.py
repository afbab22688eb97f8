"""Spans: where they lie, which tokens belong to them, and what they sum to."""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch

import heat_fast
from heat_fast.errors import HeatError, InputError
from heat_fast.locate import target_range
from heat_fast.readable import text_of
from heat_fast.result import Attribution
from heat_fast.spans import _maximal
from results import made_up
from test_result import make

TEXT = "The cat. It sat.\n\nIs it a cat?"
#: Tokens that begin with their space, one that straddles two words, one that is a line break.
PIECES = ("The", " cat", ".", " It", " sat", ".\n", "\n", "Is", " it", " a c", "at", "?")


def pieces(scores: list[float] | None = None, rows: int = 2) -> Attribution:
    ends = torch.tensor([len(piece) for piece in PIECES]).cumsum(0).tolist()
    offsets = [(0, 0), *zip([0, *ends[:-1]], ends, strict=True)]
    values = torch.rand(rows, len(offsets)) if scores is None else torch.tensor([scores])
    return make(values.tolist(), tokens=("<s>", *PIECES), text=TEXT, offsets=tuple(offsets))


# --- which tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "tokens"),
    [
        ({"text": "It sat"}, (4, 6)),  # its space belongs to it
        ({"text": " It sat"}, (4, 6)),
        ({"text": "cat", "occurrence": 0}, (2, 3)),
        ({"text": "cat", "occurrence": -1}, (11, 12)),  # "c" lies in a token that begins before
        ({"text": "a", "occurrence": 2}, (10, 11)),
        ({"characters": (0, 8)}, (1, 4)),
        ({"characters": (8, 17)}, (4, 7)),
        ({"characters": (17, 18)}, (7, 8)),  # a line break stands for itself
        ({"characters": (0, len(TEXT))}, (1, 13)),  # what was added belongs to no characters
        ({"tokens": (0, 1)}, (0, 1)),
        ({"tokens": (3, 13)}, (3, 13)),
    ],
)
def test_which_tokens_belong_to_a_span(where: dict[str, Any], tokens: tuple[int, int]) -> None:
    result = pieces()
    span = result.span(**where)
    assert (span.start, span.stop) == tokens
    assert len(span) == tokens[1] - tokens[0]
    expected = result.scores[slice(*tokens)].sum().item()
    assert span.score == pytest.approx(expected, rel=1e-6)
    assert span.share == pytest.approx(expected / result.scores.sum().item(), rel=1e-6)
    assert span.curvature == pytest.approx(
        result.aggregated("curvature")[slice(*tokens)].sum().item(), rel=1e-6
    )


def test_shares_of_signed_scores_are_those_of_the_ranking() -> None:
    result = pieces()
    signed = result.target_scores * torch.tensor([1.0, -1.0] * 7)[: len(result)]
    result = dataclasses.replace(result, target_scores=signed)
    share = result.span(tokens=(3, 6)).share
    assert share == pytest.approx(float(result.shares()[3:6].sum()))
    assert result.span(tokens=(0, len(result))).share == pytest.approx(1)


def test_neighbours_share_no_token_and_lose_none() -> None:
    result = pieces()
    for border in range(1, len(TEXT)):
        parts = []
        for characters in ((0, border), (border, len(TEXT))):
            try:
                parts.append(result.span(characters=characters))
            except InputError:  # the last token straddles the border and belongs to the left
                parts.append(None)
        left, right = parts
        assert left is not None and left.start == 1
        assert left.stop == (13 if right is None else right.start)
        assert right is None or right.stop == 13


def test_a_span_knows_its_text() -> None:
    span = pieces().span(characters=(8, 17), name="middle")
    assert (span.text, span.characters, span.name) == (" It sat.\n", (8, 17), "middle")
    assert pieces().span(tokens=(0, 1)).characters is None
    bare = make(text=None, offsets=None)
    assert bare.span(tokens=(1, 3)).text == "the cat"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "0 of text, characters and tokens"),
        ({"text": "It", "tokens": (0, 1)}, "2 of text"),
        ({"text": "dog"}, "'dog' does not occur in the prompt"),
        ({"text": ""}, "expected some text"),
        ({"text": "cat"}, "occurs 2 times in the prompt: expected to know which"),
        ({"text": "cat", "occurrence": 2}, "expected -2 to 1"),
        ({"tokens": (0, 1), "occurrence": 0}, "occurrence without text"),
        ({"tokens": (2, 2)}, "no range of the 13 prompt tokens"),
        ({"tokens": (0, 14)}, "stop <= 13"),
        ({"tokens": (0.0, 1.0)}, "no range"),
        ({"characters": (5, 3)}, "no range of the 30 characters"),
        ({"characters": 3}, "no range"),
        ({"characters": (1, 3)}, "no token begins in characters 1 to 3 ('he')"),
    ],
)
def test_spans_that_cannot_be(where: dict[str, Any], message: str) -> None:
    import re

    with pytest.raises(InputError, match=re.escape(message)):
        pieces().span(**where)


def test_whole_numbers_of_numpy_are_positions() -> None:
    result, whole = pieces(), numpy.int64
    span = result.span(tokens=(whole(3), whole(13)))
    assert span == result.span(tokens=(3, 13))
    assert result.span(tokens=numpy.array([3, 13])) == span
    assert {type(span.start), type(span.stop)} == {int}
    assert result.span(characters=(whole(8), numpy.uint8(17))) == result.span(characters=(8, 17))
    assert result.top_spans(whole(3)) == result.top_spans(3)
    assert target_range((" t0", " t1"), (whole(0), whole(1))) == (0, 1)
    assert result.span_to_span("It sat", (whole(0), whole(1))) == result.span_to_span(
        "It sat", (0, 1)
    )
    for wrong in (True, numpy.True_, numpy.float64(1)):
        with pytest.raises(InputError, match="is no range"):
            result.span(tokens=(0, wrong))
        with pytest.raises(InputError, match="expected a whole number"):
            result.top_spans(wrong)


def test_characters_need_positions() -> None:
    for call in (
        lambda result: result.span("the"),
        lambda result: result.by_sentence(),
        lambda result: result.by_segment({"a": "the"}),
    ):
        with pytest.raises(InputError, match="positions of the tokens in the text are not known"):
            call(make(text=None, offsets=None))


# --- several --------------------------------------------------------------------------------------


def test_words_take_the_prompt_apart() -> None:
    result = pieces()
    found = result.by_word()
    assert [each.text.strip() for each in found] == [
        *("The", "cat", "."),
        *("It", "sat", "."),
        *("Is", "it", "a c", "at", "?"),  # the token that straddles two is of the first
    ]
    assert (found[0].start, found[-1].stop) == (1, 13)
    assert all(left.stop == right.start for left, right in pairwise(found))
    assert sum(each.score for each in found) == pytest.approx(result.scores[1:].sum().item())


def test_words_join_what_the_tokenizer_cut() -> None:
    cut = made_up(["un", "believ", "ably", " 東", "京", ",", " it", "'s", " 3", ".", "14"])
    texts = [each.text for each in cut.by_word()]
    assert texts == ["unbelievably", " 東", "京", ",", " it's", " 3.14"]
    # A token of several words is of the first; the second has no token of its own.
    assert [each.text for each in made_up(["one", " two three"]).by_word()] == [
        "one",
        " two three",
    ]


def test_stretches_of_one_role_are_named_by_it() -> None:
    result = made_up(["<s>", "be", " brief", "<u>", "Why", "<u>", "Now"])
    roles = (None, "system", "system", None, "user", None, "user")
    found = dataclasses.replace(result, roles=roles).by_role()
    assert [(each.name, each.text) for each in found] == [
        ("system", "be brief"),
        ("user", "Why"),
        ("user", "Now"),
    ]
    with pytest.raises(InputError, match="which tokens are whose"):
        result.by_role()


def test_sentences_take_the_prompt_apart() -> None:
    pytest.importorskip("sentencex")
    result = pieces()
    found = result.by_sentence()
    assert [each.text.strip() for each in found] == ["The cat.", "It sat.", "Is it a cat?"]
    assert (found[0].start, found[-1].stop) == (1, 13)
    assert all(left.stop == right.start for left, right in pairwise(found))
    assert sum(each.score for each in found) == pytest.approx(result.scores[1:].sum().item())


def test_sentences_know_abbreviations_and_other_scripts(demo: Any) -> None:
    pytest.importorskip("sentencex")
    text = "Dr. Smith paid $3.50. He left!"
    result = heat_fast.attribute(demo.model, demo.tokenizer, text, variant="gs")
    assert [each.text for each in result.by_sentence()] == ["Dr. Smith paid $3.50.", " He left!"]


@pytest.mark.parametrize("language", [None, 3, "", "e", "english", "EN", "en-", "en\n", "e1"])
def test_languages_that_are_no_codes(language: Any) -> None:
    with pytest.raises(InputError, match=r"^language=.*: expected an ISO 639 code .* Pass one\.$"):
        pieces().by_sentence(language)


@pytest.mark.parametrize("language", ["de", "yue", "pt-BR", "es-419"])
def test_languages_by_their_codes(language: str) -> None:
    pytest.importorskip("sentencex")
    assert len(pieces().by_sentence(language)) == 3


def test_without_the_splitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(HeatError, match=r"sentencex is not installed.*heat-fast\[sentences\]"):
        pieces().by_sentence()


def test_segments_by_your_own_names() -> None:
    result = pieces()
    found = result.by_segment(
        {"context": "The cat. It sat.", "question": (18, 30), "start": result.span(tokens=(0, 1))}
    )
    assert {name: (each.start, each.stop) for name, each in found.items()} == {
        "context": (1, 7),
        "question": (8, 13),
        "start": (0, 1),
    }
    assert [each.name for each in found.values()] == list(found)
    with pytest.raises(InputError, match="segment 'b': 'dog' does not occur"):
        result.by_segment({"a": "It", "b": "dog"})
    for wrong in ({}, ["It"]):
        with pytest.raises(InputError, match="expected a mapping"):
            result.by_segment(wrong)  # type: ignore[arg-type]


def test_segments_that_came_with_the_prompt() -> None:
    demo = heat_fast.load_demo_model(1)
    prompt = demo.examples[0].prompt
    fact, end = "The mountain of Mirmora is Fenston.", len(prompt)
    segments = {"fact": fact, "question": (prompt.index("Question"), end)}

    def run(prompt: object, segments: object) -> Attribution:
        return heat_fast.attribute(
            demo.model, demo.tokenizer, prompt, curvature="none", segments=segments
        )

    result = run(prompt, segments)
    assert result.by_segment() == result.by_segment(segments)
    assert result.by_segment()["fact"].text.strip() == fact
    assert heat_fast.from_dict(result.to_dict()).by_segment() == result.by_segment()
    # Of ids they are ranges of tokens.
    ids = run(list(result.token_ids), result.segments)
    assert ids.segments == result.segments
    assert [each.share for each in ids.by_segment().values()] == [
        each.share for each in result.by_segment().values()
    ]
    with pytest.raises(InputError, match="came without segments: expected some"):
        run(prompt, None).by_segment()
    with pytest.raises(InputError, match=r"segment 'a': 'Mirmora' occurs \d+ times"):
        run(prompt, {"a": "Mirmora"})
    with pytest.raises(
        InputError, match=r"segment 'a': 'xxxx+\.\.\.x+' does not occur in the prompt"
    ):
        run(prompt, {"a": "x" * 500})
    for wrong, words in (
        ([fact] * 200, "expected a mapping of at least one name"),
        ("fact", "expected a mapping of at least one name"),
        ({1: fact}, "name is 1: expected some text"),
        ({"": fact}, "name is '': expected some text"),
        ({"a": None}, "None is no part of a prompt: expected some text of it, or its range"),
        ({"a": [fact] * 200}, "is no part of a prompt"),
        ({"a": ""}, "looked for is '': expected some text"),
        ({"a": (3, 3)}, "is no range of the"),
        ({"a": (0, end + 1)}, "is no range of the"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            run(prompt, wrong)
        assert len(str(caught.value)) < 500
    # A retrieval that found nothing names nothing.
    assert run(prompt, {}).segments == {}
    for segments in ({"fact": [0, 500]}, {"fact": 3}, [1, 2], None):
        with pytest.raises(InputError, match=r"expected|is no range of the"):
            dataclasses.replace(result, metadata={**result.metadata, "segments": segments})


def test_segments_of_a_result_that_is_there() -> None:
    result = pieces()
    named = result.with_segments({"first": "The cat.", "start": result.span(tokens=(0, 1))})
    assert named.segments == {"first": (1, 4), "start": (0, 1)}
    assert (result.segments, named.scores.tolist()) == ({}, result.scores.tolist())
    # What a chat template trimmed is found, and so is the white space that is there.
    assert result.with_segments({"a": "\n The cat.\t"}).segments == {"a": (1, 4)}
    other = make(tokens=("a", "b", "c"), text="abc", offsets=((0, 1), (1, 2), (2, 3)))
    with pytest.raises(InputError, match="reads otherwise in this prompt"):
        result.by_segment({"a": other.span(tokens=(1, 2))})


def test_stretches_that_stand_out() -> None:
    result = pieces([0, 0, 9, 8, 0, 0, 0, 0, 0, 5, 0, 6, 0])
    found = result.top_spans(9)
    assert [(each.start, each.stop) for each in found] == [(2, 4), (9, 12)]
    assert found[0].text == " cat."
    assert len(result.top_spans(1)) == 1
    with pytest.raises(InputError, match="at least 1"):
        result.top_spans(0)
    assert pieces([1.0] * 13).top_spans() == []


def test_maximal_stretches_are_those_of_the_definition() -> None:
    """By definition: the stretch of the highest sum, then the same left and right of it, until no
    sum is positive."""

    def by_definition(values: list[float], low: int, high: int) -> list[tuple[int, int]]:
        stretches = [(a, b) for a in range(low, high) for b in range(a + 1, high + 1)]
        best = max(stretches, key=lambda each: sum(values[slice(*each)]), default=(0, 0))
        if sum(values[slice(*best)]) <= 0:
            return []
        left, right = (low, best[0]), (best[1], high)
        return [*by_definition(values, *left), best, *by_definition(values, *right)]

    for _ in range(100):
        values = torch.randn(12, dtype=torch.float64).tolist()  # no two sums are the same
        assert _maximal(values) == by_definition(values, 0, 12)


# --- to a part of the target ----------------------------------------------------------------------


def test_span_to_span_is_the_sum_of_the_aggregated_scores() -> None:
    result = pieces(rows=4)
    rows = result.target_scores
    assert result.target_tokens == (" t0", " t1", " t2", " t3")
    for where, chosen in (
        (None, rows),
        ((1, 3), rows[1:3]),
        ("t1 t2", rows[1:3]),
        (" t3", rows[3:]),
    ):
        expected = chosen.mean(0)[4:7].sum().item()
        assert result.span_to_span("It sat.", where) == pytest.approx(expected, rel=1e-6)
    greatest = make(
        rows.tolist(), tokens=result.tokens, text=TEXT, offsets=result.offsets, aggregate="max"
    )
    assert greatest.span_to_span((8, 17), (0, 2)) == pytest.approx(
        rows[:2].amax(0)[4:7].sum().item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("where", "tokens"),
    [
        ("\N{GRINNING FACE}", (2, 5)),
        ("\N{GRINNING FACE}!", (2, 6)),
        ("Fen \N{GRINNING FACE}!", (0, 6)),
        ("\u6771\u4eac", (6, 9)),
        ("\u4eac", (8, 9)),
    ],
)
def test_characters_of_several_tokens(where: str, tokens: tuple[int, int]) -> None:
    """A token belongs where its first character lies, of which it may be a part."""
    readable = (" Fen", " ", "<0xF0><0x9F>", "<0x98>", "<0x80>", "!")
    readable += ("<0xE6><0x9D>", "<0xB1><0xE4><0xBA>", "<0xAC>")
    assert target_range(readable, where) == tokens


def test_text_of_bytes() -> None:
    assert (
        text_of((" Fen", " ", "<0xF0><0x9F>", "<0x98>", "<0x80>", ".")) == " Fen \N{GRINNING FACE}."
    )
    assert text_of(("a", "<0xF0><0x9F>", "<0x41>")) == "a<0xF0><0x9F><0x41>"


def test_half_a_character_is_no_obstacle() -> None:
    assert target_range(("\ud83d", "b", "<0x41>"), "b") == (1, 2)
    assert target_range(("\ud83d", "b", "<0x41>"), "<0x41>") == (2, 3)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((0, 3), "no range of the 2 target tokens"),
        ("x", "does not occur in the target"),
        ("t", "occurs 2 times"),
        ("1", "no token of the target begins in '1'"),
    ],
)
def test_target_spans_that_cannot_be(where: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        target_range((" t0", " t1"), where)
