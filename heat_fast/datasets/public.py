"""The public sets of the HEAT paper, from files or from the Hugging Face hub."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, Final, TypeVar

from heat_fast.checks import check_whole, is_whole, suggest
from heat_fast.datasets.example import Example, Span
from heat_fast.datasets.rows import PathLike, file_rows, hub_rows
from heat_fast.datasets.text import answer_span, common, merge, sentences, shift, strip
from heat_fast.errors import InputError

Row = Mapping[str, Any]
# An example of a row, or None for a row that lacks what an example needs.
Build = Callable[[Row, str], Example | None]
Made = TypeVar("Made")

#: Where the hub has a set, and the split that is read when none is named.
HUB: Final = {
    "tellmewhy": ("StonyBrookNLP/tellmewhy", "validation"),
    "wikibio": ("potsawee/wiki_bio_gpt3_hallucination", "evaluation"),
    "sciq": ("allenai/sciq", "validation"),
    "narrativeqa": ("deepmind/narrativeqa", "validation"),
}


def load(
    name: str, path: PathLike | None = None, *, split: str | None = None, limit: int | None = None
) -> list[Example]:
    """The examples of a set by its name: the function of that name in this package, called.

    name: "longra", "tellmewhy", "wikibio", "sciq", "narrativeqa" or "authors".
    path: a file of JSON Lines, a JSON array (.json) or Parquet (.parquet), in the field names of
        the public set. None: from the Hugging Face hub, for which `datasets` must be installed;
        "longra" and "authors" are not on it.
    split: of the set on the hub.
    limit: most examples; with it the hub is streamed, so that no more is downloaded than is read.

    Rows without what an example needs (an answer, a support) are left out. Ids differ: an id that
    comes again has a number behind it.

    Raises InputError for an unknown name, a file or split that cannot be read, and fields that
    are missing or of the wrong kind; MissingPackageError where `datasets` is needed and not
    installed.
    """
    if name not in _BUILD:
        raise InputError(
            f"no data set is called {name!r}: expected a name that is known. "
            f"{suggest(name, _BUILD)}"
        )
    build = _BUILD[name]

    def made(row: Row, number: int) -> Example | None:
        return build(row, str(row.get("id") or f"{name}-{number}"))

    return _apart(list(islice(_read(name, path, split, limit, made), limit)))


def _apart(examples: list[Example]) -> list[Example]:
    """The same with ids that differ: a question that has several answers comes several times."""
    taken = {each.id for each in examples}
    seen: Counter[str] = Counter()
    found = []
    for each in examples:
        seen[each.id] += 1
        if seen[each.id] > 1:
            names = (f"{each.id}-{again}" for again in count(seen[each.id]))
            each = replace(each, id=next(name for name in names if name not in taken))
            taken.add(each.id)
        found.append(each)
    return found


def _read(
    name: str,
    path: PathLike | None,
    split: str | None,
    limit: int | None,
    make: Callable[[Row, int], Made | None],
) -> Iterator[Made]:
    """What is made of the rows of a set, counted from 0; an error says which row it is about."""
    rows = _rows(name, path, split, limit)
    source = HUB[name][0] if path is None else repr(str(path))

    def attempt(number: int, row: Row) -> Made | None:
        try:
            return make(row, number)
        except InputError as error:
            raise InputError(f"row {number + 1} of {source}: {error}") from error

    return (found for found in map(attempt, count(), rows) if found is not None)


def _rows(name: str, path: PathLike | None, split: str | None, limit: int | None) -> Iterator[Row]:
    if limit is not None:
        check_whole("limit", limit, 0)
    if path is not None:
        if split is not None:
            raise InputError(
                f"both a path and split={split!r} are given: expected a split only for the hub. "
                "Pass the file of that split, or leave path out."
            )
        return file_rows(path)
    if name not in HUB:
        raise InputError(
            f"{name} is not on the Hugging Face hub: expected path=, a file with its rows. See the "
            "page on data sets for the fields."
        )
    home, usual = HUB[name]
    return hub_rows(home, split or usual, stream=limit is not None)


# --- fields ---------------------------------------------------------------------------------------


def _text(row: Row, *names: str) -> str:
    """The first of the named fields that holds text; "a.b" is field b of field a."""
    present = False
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value.strip():
            return value.strip()
        present |= name.split(".")[0] in row
    if not present:
        raise InputError(
            f"there is no field {' or '.join(names)}: expected it beside {sorted(row)}. Rename "
            "the field, or load the set that this file holds."
        )
    return ""


def _list(name: str, value: Any, kind: str, fits: Callable[[Any], bool]) -> Sequence[Any]:
    """The value of a field that holds a list, or an error."""
    if not isinstance(value, (list, tuple)) or not all(map(fits, value)):
        raise InputError(
            f"{name} is {reprlib.repr(value)}: expected a list of {kind}. Correct the field."
        )
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _span(row: Row, span: str, name: str, prompt: str) -> tuple[Span, ...]:
    """A span that a row gives as characters of its prompt, or else as the text itself."""
    value = row.get(span)
    if value is None:
        piece = _text(row, name)
        place = prompt.find(piece) if piece else -1
        return () if place < 0 else ((place, place + len(piece)),)
    whole = row["prompt"]
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_whole, value))
    if not pair or not 0 <= value[0] < value[1] <= len(whole):
        raise InputError(
            f"{span} is {reprlib.repr(value)}: expected [start, stop] with 0 <= start < stop <= "
            f"{len(whole)}, characters of the prompt. Correct the field."
        )
    # The prompt is read without the white space around it.
    kept = strip(whole, (0, len(whole)))
    return shift(common([(value[0], value[1])], [kept]), -kept[0])


def reading(
    name: str, passage: str, question: str, answer: str, evidence: tuple[Span, ...], **extra: Any
) -> Example | None:
    """A passage, a question about it and `Answer:`; None where one of the three is missing."""
    if not (passage and question and answer):
        return None
    return Example(
        name,
        f"{passage}\nQuestion: {question}\nAnswer:",
        f" {answer}",
        evidence=evidence,
        support=((0, len(passage)),),
        extra={"question": question, "answer": answer, **extra},
    )


# --- the sets -------------------------------------------------------------------------------------


def _longra(row: Row, name: str) -> Example | None:
    prompt, target = _text(row, "prompt"), _text(row, "target")
    if not (prompt and target):
        return None
    return Example(
        name,
        prompt,
        f" {target}",
        evidence=_span(row, "antecedent_char_span", "antecedent", prompt),
        distractor=_span(row, "distractor_char_span", "distractor", prompt),
        extra={
            "prompt_no_distractor": _text(row, "prompt_no_distractor"),
            "category": row.get("category"),
        },
    )


def _tellmewhy(row: Row, name: str) -> Example | None:
    narrative = _text(row, "narrative")
    return reading(
        str(row.get("id") or row.get("question_meta") or name),
        narrative,
        _text(row, "question"),
        _text(row, "answer"),
        _helpful(row, narrative),
    )


def _helpful(row: Row, narrative: str) -> tuple[Span, ...]:
    """The sentences that helped the annotator, which the set counts from 1."""

    def given(name: str, kind: str, fits: Callable[[Any], bool]) -> Sequence[Any]:
        return () if row.get(name) is None else _list(name, row[name], kind, fits)

    chosen = given("helpful_sentences", "whole numbers", is_whole)
    told, found, place = given("original_narrative_form", "texts", _is_text), [], 0
    for number, sentence in enumerate(told, start=1):
        start = narrative.find(sentence.strip(), place)
        if start < 0:
            continue
        place = start + len(sentence.strip())
        if number in chosen:
            found.append((start, place))
    return merge(found)


# The first verb of a biography with the word behind it.
_IS_A: Final = re.compile(r"\b(?:is|was)\s+\S+")


def _wikibio(row: Row, name: str) -> Example | None:
    if "prompt" in row:
        prompt, rest = _text(row, "prompt"), _text(row, "continuation")
    else:
        text = _text(row, "wiki_bio_text")
        first = next((text[start:stop] for start, stop in sentences(text)), "")
        verb = _IS_A.search(first)
        end = verb.end() if verb else len(first)
        prompt, rest = first[:end], first[end:].strip()
    if not (prompt and rest):
        return None
    index = row.get("wiki_bio_test_idx")
    if "id" not in row and index is not None:
        name = f"wikibio-{index}"
    extra = {key: row[key] for key in ("gpt3_sentences", "annotation") if key in row}
    return Example(name, prompt, f" {rest}", extra=extra)


def _sciq(row: Row, name: str) -> Example | None:
    support, question = _text(row, "support"), _text(row, "question")
    answer = _text(row, "correct_answer")
    return reading(name, support, question, answer, answer_span(support, answer, question))


def _narrativeqa(row: Row, name: str) -> Example | None:
    if "paragraph" in row and "question" not in row:
        raise InputError(
            "there is a paragraph and no question: expected question, answers and summary. Read "
            "paragraphs with narratives()."
        )
    summary = _text(row, "summary", "document.summary.text")
    question = _text(row, "question", "question.text")
    answers = _answers(row)
    answer = answers[0].strip() if answers else ""
    evidence = answer_span(summary, answer.rstrip("."), question)
    return reading(name, summary, question, answer, evidence, answers=answers)


def _answers(row: Row) -> tuple[str, ...]:
    """All answers of a row, as texts or as the hub nests them; a text alone is one answer."""

    def text(each: Any) -> Any:
        return each.get("text") if isinstance(each, Mapping) else each

    given = row.get("answers")
    if given is None:
        return ()
    found = [given] if isinstance(given, str) else given
    found = _list("answers", found, "texts", lambda each: _is_text(text(each)))
    return tuple(map(text, found))


def _authors(row: Row, name: str) -> Example | None:
    prompt, support = _text(row, "input_text"), _text(row, "sciq_support_segment")
    narrative, question = _text(row, "narrative_segment"), _text(row, "question")
    answer = _text(row, "answer")
    begin = prompt.find(support, len(narrative))
    if not (prompt and support and answer) or not prompt.startswith(narrative) or begin < 0:
        return None
    pieces = [found.span() for found in re.finditer(r"\S+", support)]
    evidence, field = [], "important_word_indices_in_sciq_support"
    given = row.get(field)
    for number in _list(field, () if given is None else given, "whole numbers", is_whole):
        if not 0 <= number < len(pieces):
            raise InputError(
                f"{name} marks word {number} of its support: expected at most {len(pieces) - 1}, "
                f"words counted from 0. Correct {field}."
            )
        start, stop = pieces[number]
        # The authors split at spaces; a full stop is not a word of theirs.
        bare = support[start:stop].rstrip(".,;:!?")
        evidence.append((begin + start, begin + start + len(bare)))
    return Example(
        name,
        prompt,
        f" {answer}",
        evidence=merge(evidence),
        distractor=((0, len(narrative)),),
        support=((begin, begin + len(support)),),
        extra={"question": question, "answer": answer},
    )


_BUILD: Final[dict[str, Build]] = {
    "longra": _longra,
    "tellmewhy": _tellmewhy,
    "wikibio": _wikibio,
    "sciq": _sciq,
    "narrativeqa": _narrativeqa,
    "authors": _authors,
}


def longra(path: PathLike, *, limit: int | None = None) -> list[Example]:
    """Long-range agreement (Vafa et al. 2021): a word that an earlier one fixes, past a digression.

    Evidence: the antecedent; distractor: the digression between it and the end. `extra` has
    `prompt_no_distractor`, the prompt without the digression, and the `category` of the pair.

    Fields: prompt, target, prompt_no_distractor, category, and antecedent_char_span and
    distractor_char_span ([start, stop] in the prompt) or the texts antecedent and distractor. The
    set is not known to be on the hub: its authors publish templates and word pairs.
    """
    return load("longra", path, limit=limit)


def tellmewhy(
    path: PathLike | None = None, *, split: str | None = None, limit: int | None = None
) -> list[Example]:
    """TellMeWhy (Lal et al. 2021): a short narrative, why somebody did something, a crowd answer.

    Evidence: the sentences that helped the annotator, where the file has them. Every answer of a
    question is an example. Fields: narrative, question, answer; question_meta (the id), and
    helpful_sentences with original_narrative_form.
    """
    return load("tellmewhy", path, split=split, limit=limit)


def wikibio(
    path: PathLike | None = None, *, split: str | None = None, limit: int | None = None
) -> list[Example]:
    """WikiBio GPT-3 hallucinations (Manakul et al. 2023): how a biography begins, to be continued.

    The prompt is the first sentence up to the word after its first "is" or "was", the target the
    rest of the sentence. No evidence is known. Fields: wiki_bio_text, or prompt and continuation;
    gpt3_sentences and annotation go to `extra`.
    """
    return load("wikibio", path, split=split, limit=limit)


def sciq(
    path: PathLike | None = None, *, split: str | None = None, limit: int | None = None
) -> list[Example]:
    """SciQ (Welbl et al. 2017): a science passage and a question about it.

    Support: the passage; evidence: the answer in it, where it stands there as whole words, in the
    sentence that shares most words with the question. Fields: support, question, correct_answer.
    """
    return load("sciq", path, split=split, limit=limit)


def narrativeqa(
    path: PathLike | None = None, *, split: str | None = None, limit: int | None = None
) -> list[Example]:
    """NarrativeQA (Kočiský et al. 2018): the summary of a story and a question about it.

    Support: the summary; target: the first answer; `extra` has all answers; evidence: the answer
    where the summary has its words. Fields: question, answers (a list, or one text) and summary, as
    text or as the hub nests them. For the curated set see :func:`narratives`.
    """
    return load("narrativeqa", path, split=split, limit=limit)


def authors(path: PathLike, *, limit: int | None = None) -> list[Example]:
    """The file that the authors of the HEAT paper publish: pairs of a narrative and a science fact.

    As :func:`curated`, with the authors' important words as evidence. Fields: input_text,
    narrative_segment, sciq_support_segment, question, answer and
    important_word_indices_in_sciq_support.
    """
    return load("authors", path, limit=limit)


def narratives(
    path: PathLike | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    most_words: int = 100,
) -> list[str]:
    """Segments of NarrativeQA's summaries, each once, for the curated set.

    A file's field paragraph is taken as it is. Of a summary (summary, or document.summary.text)
    these are the leading sentences of at most `most_words` words, at least one: the beginning of
    a story refers to nothing before it. Arguments and errors as in :func:`load`.
    """
    check_whole("most_words", most_words, 0)

    def segment(row: Row, _: int) -> str | None:
        text = _text(row, "paragraph", "summary", "document.summary.text")
        return (text if "paragraph" in row else _leading(text, most_words)) or None

    found: dict[str, None] = {}
    for each in _read("narrativeqa", path, split, limit, segment):
        if len(found) == limit:
            break
        found[each] = None
    return list(found)


def _leading(text: str, most_words: int) -> str:
    end = 0
    for _, stop in sentences(text):
        if end and len(text[:stop].split()) > most_words:
            break
        end = stop
    return text[:end]
