"""Data sets: rows become prompts with spans; the paper's pairs, annotators, BM25, tokens."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import heat_fast
from heat_fast import datasets
from heat_fast.datasets.public import reading
from heat_fast.datasets.text import common, merge, sentences
from heat_fast.errors import HeatError, InputError

SETS = Path(
    os.environ.get(
        "HEAT_FAST_SETS", Path(__file__).resolve().parents[2] / "shared" / "data" / "sets"
    )
)
SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair))),
    max_size=6,
)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def characters(spans: Any) -> set[int]:
    return {place for start, stop in spans for place in range(start, stop)}


def science(number: int = 0) -> datasets.Example:
    found = reading(f"q{number}", "Snow is white.", "Which colour?", "white", ((8, 13),))
    assert found is not None
    return found


# --- rows to examples -----------------------------------------------------------------------------


def test_longra_reads_spans_and_texts(tmp_path: Path) -> None:
    prompt = "It was big (so I thought), but then it was even"
    given_spans = {"antecedent_char_span": [7, 10], "distractor_char_span": [11, 25]}
    row = {"prompt": prompt, "target": "bigger", "prompt_no_distractor": "It was big, even"}
    by_text = {"antecedent": "big", "distractor": "(so I thought)"}
    path = write(tmp_path / "rows.jsonl", {**row, **given_spans}, {**row, **by_text})
    first, second = datasets.longra(path)
    assert first.target == " bigger"
    assert first.texts("evidence") == second.texts("evidence") == ["big"]
    assert first.texts("distractor") == second.texts("distractor") == ["(so I thought)"]
    assert first.extra["prompt_no_distractor"] == "It was big, even"


def test_spans_move_with_the_white_space_around_a_prompt(tmp_path: Path) -> None:
    row = {"prompt": " \tIt was big, even ", "target": "bigger", "prompt_no_distractor": "It was"}
    spans = {"antecedent_char_span": [9, 12], "distractor_char_span": [0, 8]}
    [example] = datasets.longra(write(tmp_path / "rows.jsonl", {**row, **spans}))
    assert example.prompt == "It was big, even"
    assert example.texts("evidence") == ["big"]
    assert example.texts("distractor") == ["It was"]  # white space that is not read is no part


def test_ids_differ_from_one_another_and_from_those_that_are_given(tmp_path: Path) -> None:
    row = {"support": "Ice is cold.", "question": "What is cold?", "correct_answer": "ice"}
    given = ["a", "a", "a-2", "b", "a", "a-4", "a-2"]
    path = write(tmp_path / "rows.jsonl", *({**row, "id": name} for name in given))
    found = [example.id for example in datasets.sciq(path)]
    assert found == ["a", "a-3", "a-2", "b", "a-5", "a-4", "a-2-2"]


def test_tellmewhy_marks_the_helpful_sentences(tmp_path: Path) -> None:
    row = {
        "narrative": "Ann was cold. She ran. She lit a fire.",
        "original_narrative_form": ["Ann was cold.", "She ran.", "She lit a fire."],
        "question": "Why did she light a fire?",
        "answer": "She was cold.",
        "question_meta": "m1",
        "helpful_sentences": [1, 3],
    }
    example, again = datasets.tellmewhy(write(tmp_path / "rows.jsonl", row, row))
    assert (example.id, again.id) == ("m1", "m1-2")  # one of several answers
    assert example.texts("evidence") == ["Ann was cold.", "She lit a fire."]
    assert example.prompt.endswith("Question: Why did she light a fire?\nAnswer:")


def test_wikibio_cuts_the_first_sentence(tmp_path: Path) -> None:
    row = {"wiki_bio_text": "Ann Lee (born 1950) is a painter. She lives.", "wiki_bio_test_idx": 7}
    [example] = datasets.wikibio(write(tmp_path / "rows.jsonl", row))
    assert (example.id, example.prompt) == ("wikibio-7", "Ann Lee (born 1950) is a")
    assert example.target == " painter."


def test_sciq_takes_the_answer_nearest_to_the_question(tmp_path: Path) -> None:
    row = {
        "support": "Light is fast. Plants catch light in leaves.",
        "question": "What do plants catch?",
        "correct_answer": "light",
    }
    bare = {"support": "", "question": "What?", "correct_answer": "this"}
    [example] = datasets.sciq(write(tmp_path / "rows.jsonl", bare, row))  # no support: left out
    assert example.evidence == ((28, 33),)


def test_narrativeqa_reads_nested_fields(tmp_path: Path) -> None:
    row = {
        "document": {"summary": {"text": "Tom finds gold. He buys a farm."}},
        "question": {"text": "What does Tom buy?"},
        "answers": [{"text": "a farm."}, {"text": "land"}],
    }
    path = write(tmp_path / "rows.jsonl", row)
    [example] = datasets.narrativeqa(path)
    assert example.texts("evidence") == ["a farm"]
    assert example.extra["answers"] == ("a farm.", "land")
    assert datasets.narratives(path, most_words=3) == ["Tom finds gold."]


def test_narrativeqa_takes_a_text_as_one_answer(tmp_path: Path) -> None:
    row = {"summary": "Tom lives in Rome.", "question": "Where?", "answers": "Rome"}
    [example] = datasets.narrativeqa(write(tmp_path / "rows.jsonl", row))
    assert (example.target, example.texts("evidence")) == (" Rome", ["Rome"])
    assert example.extra["answers"] == ("Rome",)


def test_authors_count_words_of_the_support(tmp_path: Path) -> None:
    row = {
        "input_text": "He left. <s> Ice is cold water. <s> Question: What is ice?",
        "narrative_segment": "He left.",
        "sciq_support_segment": "Ice is cold water.",
        "question": "What is ice?",
        "answer": "water",
        "important_word_indices_in_sciq_support": [2, 3],
    }
    [example] = datasets.authors(write(tmp_path / "rows.jsonl", row))
    assert example.texts("evidence") == ["cold", "water"]
    assert example.texts("distractor") == ["He left."]
    row["important_word_indices_in_sciq_support"] = [9]
    with pytest.raises(InputError, match="marks word 9"):
        datasets.authors(write(tmp_path / "rows.jsonl", row))


def test_formats_hold_the_same_rows(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows = [{"support": "Ice is cold.", "question": "What is cold?", "correct_answer": "ice"}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    lines = datasets.sciq(write(tmp_path / "rows.jsonl", *rows))
    assert len(lines) == 3
    assert datasets.sciq(tmp_path / "rows.json") == lines
    assert datasets.sciq((tmp_path / "rows.json").rename(tmp_path / "ROWS.JSON")) == lines
    assert datasets.sciq(tmp_path / "rows.parquet") == lines
    for limit in (2, numpy.int64(2)):
        assert datasets.sciq(tmp_path / "rows.jsonl", limit=limit) == lines[:2]


def test_the_hub_is_asked_for_the_public_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        if split == "none":
            raise ValueError("Bad split: none")
        return [{"support": "Ice is cold.", "question": "What is cold?", "correct_answer": "ice"}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert len(datasets.sciq(limit=1)) == len(datasets.sciq(split="test")) == 1
    assert asked == [("allenai/sciq", "validation", True), ("allenai/sciq", "test", False)]
    with pytest.raises(InputError, match="cannot load split 'none' of allenai/sciq"):
        datasets.sciq(split="none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HeatError, match="pip install datasets, or pass path="):
        datasets.sciq()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("scik",), {}, "no data set is called 'scik'"),
        (("longra",), {}, "not on the Hugging Face hub"),
        (("sciq", "here.jsonl"), {"split": "test"}, "both a path and split"),
        (("sciq", "here.jsonl"), {"limit": -1}, "limit=-1"),
        (("sciq", "here.jsonl"), {"limit": 1.5}, "limit=1.5"),
        (("sciq", "here.jsonl"), {"limit": "x"}, "limit='x'"),
        (("sciq", "/nowhere/rows.jsonl"), {}, "/nowhere/rows.jsonl"),
    ],
)
def test_bad_arguments(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        datasets.load(*arguments, **settings)


def test_bad_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no field support"):
        datasets.sciq(write(tmp_path / "rows.jsonl", {"text": "x"}))
    row = {"support": "Ice is cold.", "question": "What is cold?", "correct_answer": "ice"}
    with pytest.raises(InputError, match=r"row 2 of .*rows.jsonl': there is no field question"):
        datasets.sciq(write(tmp_path / "rows.jsonl", row, {"support": "Ice is cold."}))
    with pytest.raises(InputError, match=r"row 1 of .*rows.jsonl': there is no field paragraph"):
        datasets.narratives(write(tmp_path / "rows.jsonl", row))
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="row 1 of"):
        datasets.sciq(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(InputError, match="no array of objects"):
        datasets.sciq(tmp_path / "rows.json")


LONGRA = {"prompt": "It was big, even", "target": "bigger", "prompt_no_distractor": "It was big"}
STORY = {"summary": "Tom lives in Rome.", "question": "Where does Tom live?"}
WHY = {"narrative": "A b. C d.", "question": "Why?", "answer": "So.", "helpful_sentences": [1]}
PAIR = {
    "input_text": "He left. <s> Ice is cold. <s> What is ice?",
    "narrative_segment": "He left.",
    "sciq_support_segment": "Ice is cold.",
    "question": "What is ice?",
    "answer": "cold",
}


@pytest.mark.parametrize(
    ("name", "row", "field", "value"),
    [
        *(
            ("longra", {**LONGRA, "distractor": "was"}, "antecedent_char_span", value)
            for value in ([None, 3], ["a", "b"], [7.5, 9.9], [7, 99], [-3, -1], [True, 3], [7], "x")
        ),
        *(
            ("narrativeqa", STORY, "answers", value)
            for value in ([None], [{"x": 1}], [3], {"text": "Rome"}, 3)
        ),
        *(
            ("authors", PAIR, "important_word_indices_in_sciq_support", value)
            for value in (["1"], [1.0], 1)
        ),
        *(("tellmewhy", WHY, "helpful_sentences", value) for value in (3, 0, "1", ["1"], [1.0])),
        ("tellmewhy", WHY, "original_narrative_form", [3]),
    ],
)
def test_fields_of_the_wrong_kind(
    tmp_path: Path, name: str, row: dict[str, Any], field: str, value: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", {**row, field: value})
    with pytest.raises(
        InputError, match=rf"row 1 of .*rows.jsonl': {field} is .*: expected .+\. C"
    ):
        datasets.load(name, path)


def test_null_is_what_a_row_lacks(tmp_path: Path) -> None:
    """A row without an answer is left out; one without marked words has no evidence."""
    path = write(tmp_path / "rows.jsonl", {**STORY, "answers": None}, {**STORY, "answers": "Rome"})
    assert len(datasets.narrativeqa(path)) == 1
    field = "important_word_indices_in_sciq_support"
    [example] = datasets.authors(write(tmp_path / "pairs.jsonl", {**PAIR, field: None}))
    assert example.evidence == ()


@pytest.mark.parametrize("name", ["prompt", "target"])
def test_an_example_needs_text(name: str) -> None:
    with pytest.raises(InputError, match=f"has no {name}"):
        datasets.Example("1", **{"prompt": "a", "target": "b", name: " "})


@pytest.mark.parametrize("span", [(-1, 1), (2, 2), (0, 4)])
def test_an_example_needs_spans_in_its_prompt(span: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="0 <= start < stop <= 3"):
        datasets.Example("1", "abc", "d", evidence=(span,))


# --- the paper's pairs ----------------------------------------------------------------------------


def test_curated_uses_every_question_before_one_comes_again() -> None:
    stories = ["Tom left.", "Ann stayed.", "A white cat sat."]
    questions = [science(number) for number in range(3)]
    found = datasets.curated(stories, questions, count=5, seed=3)
    assert {each.extra["question_id"] for each in found[:3]} <= {"q0", "q1", "q2"}
    assert len({each.prompt for each in found}) == 2  # the white cat would tell the answer
    assert all(each.texts("evidence") == ["white"] for each in found)
    assert found == datasets.curated(stories, questions, count=5, seed=3)
    assert all("cat" not in each.prompt for each in found)


def test_curated_widens_evidence_by_annotations() -> None:
    [example] = datasets.curated(["Tom left."], [science()], {"q0": [(0, 4)]}, separator=" | ")
    assert example.texts("evidence") == ["Snow", "white"]
    assert example.texts("support") == ["Snow is white."]
    with pytest.raises(InputError, match="characters of its support"):
        datasets.curated(["Tom left."], [science()], {"q0": [(0, 99)]})


def test_curated_says_when_pairs_run_out() -> None:
    with pytest.raises(InputError, match=r"make 1 pairs: expected 2"):
        datasets.curated(["Tom left."], [science()], count=2)


@pytest.mark.parametrize("space", [" ", " " * 6, "\n\t     \n"])
def test_sentences_end_whatever_white_space_follows(space: str) -> None:
    assert len(sentences(f"The cat sat.{space}The dog ran.")) == 2
    assert len(sentences(f"It was Mr.{space}Lee.")) == len(sentences(f"J.{space}Smith ran.")) == 1


# --- annotators -----------------------------------------------------------------------------------


@given(SPANS, SPANS)
def test_spans_are_sets_of_characters(left: Any, right: Any) -> None:
    assert characters(common(left, right)) == characters(left) & characters(right)
    assert characters(merge(left)) == characters(left)
    together = merge([*left, *right])
    assert all(left[1] < right[0] for left, right in itertools.pairwise(together))


def test_annotators_are_read_and_intersected(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", {"id": "1", "spans": [[0, 5]]}, {"id": "2", "spans": []})
    other = write(tmp_path / "b.jsonl", {"id": "1", "spans": [[3, 9]]})
    marks = [datasets.read_annotations(path) for path in (one, other)]
    assert datasets.intersection(*marks) == {"1": ((3, 5),)}
    with pytest.raises(InputError, match="share no example"):
        datasets.intersection({"1": []}, {"2": []})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1"}, "expected id and spans"),
        ({"id": "1", "spans": [[2, 1]]}, "0 <= start < stop"),
        ({"id": "1", "spans": [[0.0, 1]]}, "0 <= start < stop"),
    ],
)
def test_bad_annotations(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        datasets.read_annotations(write(tmp_path / "a.jsonl", row))


def test_an_annotator_marks_an_example_once(tmp_path: Path) -> None:
    row = {"id": "1", "spans": []}
    with pytest.raises(InputError, match="repeats the id"):
        datasets.read_annotations(write(tmp_path / "a.jsonl", row, row))


def test_agreement_by_hand() -> None:
    """Of four tokens A marks two, B one of them: F1 2/3, p 3/4, e 1/2, kappa 1/2."""
    words = [(0, 1), (2, 3), (4, 5), (6, 7)]
    found = datasets.agreement({"1": [(0, 3)]}, {"1": [(0, 1)]}, {"1": words})
    assert found == pytest.approx((2 / 3, 0.5))
    assert datasets.agreement({"1": []}, {"1": []}, {"1": words}) == (1.0, 1.0)


# --- BM25 -----------------------------------------------------------------------------------------


def test_bm25_by_hand() -> None:
    """Two documents of 3 and 1 words; "a" is twice in the first alone."""
    idf = math.log(1 + 1.5 / 1.5)
    length = 1.5 * (0.25 + 0.75 * 3 / 2)
    scores = datasets.bm25([["a", "a", "b"], ["c"]], ["a"])
    assert scores == pytest.approx([idf * 2 * 2.5 / (2 + length), 0])
    with pytest.raises(InputError, match="hold no word"):
        datasets.bm25([[]], ["a"])


def test_bm25_evidence_needs_a_question() -> None:
    with pytest.raises(InputError, match="no support or no question"):
        datasets.bm25_evidence(datasets.Example("1", "a", "b"))
    with pytest.raises(InputError, match="count=0"):
        datasets.bm25_evidence(science(), count=0)
    assert datasets.bm25_evidence(science()) == ()  # no word in common


# --- the synthetic set, tokens --------------------------------------------------------------------


def test_synthetic_is_split_into_support_and_distractor() -> None:
    for example in datasets.synthetic(20):
        support, rest = characters(example.support), characters(example.distractor)
        assert characters(example.evidence) <= support
        assert not support & rest
        assert example.target.strip() in example.texts("evidence")
    assert datasets.synthetic(2, seed=1)[0] == datasets.synthetic(2)[1]
    with pytest.raises(InputError, match="count=-1"):
        datasets.synthetic(-1)
    assert datasets.synthetic(numpy.int64(2), seed=numpy.uint8(255)) == datasets.synthetic(2, 255)
    for wrong in ("x", 1.5, True, None):
        with pytest.raises(InputError, match=f"count={wrong!r}: expected a whole number"):
            datasets.synthetic(wrong)
        with pytest.raises(InputError, match=f"seed={wrong!r}: expected a whole number"):
            datasets.restated(1, wrong)
    with pytest.raises(InputError, match="split is 'test'"):
        datasets.synthetic(1, **{"split": "test"})


def test_bm25_finds_the_fact_of_synthetic_examples() -> None:
    """The question names relation and entity: in most of about ten sentences that suffices."""
    hits = 0
    for example in datasets.synthetic(20):
        passage = example.prompt[: example.prompt.index(example.extra["question"])]
        whole = datasets.Example(
            "1", example.prompt, " x", support=((0, len(passage)),), extra=example.extra
        )
        hits += bool(characters(datasets.bm25_evidence(whole)) & characters(example.evidence))
    assert hits >= 12  # chance would give two


def test_tokens_are_those_that_are_attributed() -> None:
    demo = heat_fast.load_demo_model(1)
    [example] = datasets.synthetic(1)
    encoded = datasets.encode(example, demo.tokenizer)
    result = heat_fast.attribute(demo.model, demo.tokenizer, example.prompt, example.target)
    assert encoded.token_ids == result.token_ids
    assert encoded.target_ids == result.target_ids
    assert result.offsets is not None
    assert encoded.evidence == tuple(datasets.tokens_in(result.offsets, example.evidence))
    assert set(encoded.evidence) <= set(encoded.support)


# --- real samples, where they are on disk ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "parts"),
    [
        ("longra", "longra", ("evidence", "distractor")),
        ("tellmewhy", "tellmewhy", ("support",)),
        ("wikibio", "wikibio", ()),
        ("sciq", "sciq", ("support",)),
        ("authors", "heta_authors", ("evidence", "distractor", "support")),
    ],
)
def test_samples(name: str, folder: str, parts: tuple[str, ...]) -> None:
    path = SETS / folder / "dev.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path} (HEAT_FAST_SETS names the folder to look in)")
    found = datasets.load(name, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answered = [row for row in rows if row.get("answer", "some")]
    assert len(found) >= 0.9 * len(answered)
    for part in parts:
        assert sum(bool(getattr(each, part)) for each in found) >= 0.9 * len(found)
    if name == "longra":
        assert [each.texts("evidence") for each in found] == [[row["antecedent"]] for row in rows]


def test_the_curated_set_of_samples() -> None:
    stories, questions = SETS / "narrativeqa" / "dev.jsonl", SETS / "sciq" / "dev.jsonl"
    if not (stories.is_file() and questions.is_file()):
        pytest.skip(f"no samples in {SETS} (HEAT_FAST_SETS names the folder to look in)")
    found = datasets.curated(datasets.narratives(stories), datasets.sciq(questions), count=150)
    assert len(found) == 150
    for example in found:
        [answer] = example.texts("evidence")
        assert answer.lower() == example.extra["answer"].lower()
        assert characters(example.evidence) <= characters(example.support)
