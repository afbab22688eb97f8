"""Many prompts from a file: what is written, what fails, and what is left after a kill."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import heat_fast
from heat_fast import Attributor, HeatConfig, batch
from heat_fast.batch import Summary, attribute_rows
from heat_fast.cli import app
from heat_fast.errors import ConfigError, HeatError, InputError, NumericalError, OutputError
from heat_fast.rows import count_rows, read_rows

Rows = list[Any]


@pytest.fixture(scope="module")
def attributor(model_folder: str) -> Attributor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return Attributor(model, tokenizer, HeatConfig(variant="gs", token_budget=64))


def write(path: Path, rows: Rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path: Path) -> list[dict[str, Any]]:
    """The results of a file, all but how long each took."""
    found = lines(path)
    for line in found:
        assert line["metadata"].pop("seconds")
    return found


GOOD: Rows = [
    {"prompt": "the red ball", "target": " b", "id": "first"},
    {"prompt": [1, 2, 3], "target": [4, 5], "id": 7},
    {"prompt": "ab", "target": "cdef", "target_span": [1, 3], "source": "somewhere"},
    {"prompt": "x", "target": None, "messages": None},
]
BAD: Rows = [
    ("not json", "the line is not JSON"),
    ("[1]", "the line is a list: expected an object"),
    ({"target": "a"}, "neither of prompt and messages"),
    ({"prompt": "a", "messages": []}, "both of prompt and messages"),
    ({"prompt": "a", "targets": "b"}, "did you mean 'target'"),
    ({"prompt": "x" * 40}, "40 tokens"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, "chat_template_kwargs beside prompt"),
    ({"prompt": "a", "target": "bc", "target_span": [0, 9]}, "no range of the 2 target tokens"),
    ({"messages": "hello"}, "messages is no list of objects"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
    ({"prompt": {"a": 1}}, "expected a tokenizer's output"),
    ({"prompt": 7}, "of type int"),
    ({"prompt": "a", "id": "\ud83d"}, "'id' is not valid Unicode"),
]


# --- what is written ------------------------------------------------------------------------------


def test_rows_become_results_in_order(tmp_path: Path, attributor: Attributor) -> None:
    source, output = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    seen: list[int] = []
    summary = attribute_rows(attributor, source, output, None, lambda now: seen.append(now.done))
    assert (summary.done, summary.failed, summary.before) == (4, 0, 0)
    assert seen == [1, 2, 3, 4]
    results = list(heat_fast.read_jsonl(output))
    assert [result.id for result in results] == ["first", "7", None, None]
    assert [result.target_tokens for result in results][2] == ("d", "e")
    direct = attributor.attribute("the red ball", " b")
    assert results[0].scores.tolist() == direct.scores.tolist()
    assert summary.tokens == sum(map(len, results))
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_bad_rows_go_to_the_side_file_and_the_others_go_on(
    tmp_path: Path, attributor: Attributor
) -> None:
    rows = [GOOD[0], *(row for row, _ in BAD), GOOD[1]]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    summary = attribute_rows(attributor, source, output)
    assert (summary.done, summary.failed) == (2, len(BAD))
    reasons = lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [each["row"] for each in reasons] == list(range(2, len(BAD) + 2))
    for reason, (_, words) in zip(reasons, BAD, strict=True):
        assert words in reason["error"]
        assert reason["kind"] == "InputError"
    assert [result.id for result in heat_fast.read_jsonl(output)] == ["first", "7"]


def test_chat_rows(tmp_path: Path, attributor: Attributor) -> None:
    attributor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }};{% endfor %}{{ end or '' }}"
    )
    try:
        messages = [{"role": "user", "content": "hi", "name": None}]
        told = {"end": "Go", "other": None}
        rows = [
            {"messages": messages, "id": "a"},
            {"messages": messages, "chat_template_kwargs": told},
        ]
        output = tmp_path / "out.jsonl"
        attribute_rows(attributor, write(tmp_path / "in.jsonl", rows), output)
    finally:
        attributor.tokenizer.chat_template = None
    result, other = heat_fast.read_jsonl(output)
    assert (result.prompt_text, other.prompt_text) == ("hi;", "hi;Go")
    assert result.roles == ("user", "user", None)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parquet_in_and_out_says_the_same_as_json_lines(
    kind: str, tmp_path: Path, attributor: Attributor
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"prompt": "the red ball", "target": " b", "id": "a"},
        {"prompt": "ab", "target": None, "id": None},
        {"prompt": "", "target": None, "id": "c"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    plain = tmp_path / "plain.jsonl"
    attribute_rows(attributor, write(tmp_path / "in.jsonl", rows), plain)
    output = tmp_path / f"out.{kind}"
    summary = attribute_rows(attributor, tmp_path / "in.parquet", output)
    assert (summary.done, summary.failed) == (2, 1)
    read = heat_fast.read_parquet if kind == "parquet" else heat_fast.read_jsonl
    found = list(read(output))
    for left, right in zip(found, heat_fast.read_jsonl(plain), strict=True):
        assert (left.id, left.tokens) == (right.id, right.tokens)
        assert left.scores.tolist() == right.scores.tolist()
    assert not (tmp_path / f"out.{kind}.partial.jsonl").exists()
    # Run again, nothing is left to do and nothing changes.
    again = attribute_rows(attributor, tmp_path / "in.parquet", output)
    assert (again.done, again.failed, again.before, again.failed_before) == (0, 0, 2, 1)
    assert [each.to_dict() for each in read(output)] == [each.to_dict() for each in found]
    # A refused run leaves the folder as it was.
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError):
        attribute_rows(attributor, write(tmp_path / "in.jsonl", rows[1:]), output)
    assert sorted(os.listdir(tmp_path)) == before


def test_two_runs_that_go_on_with_one_parquet_file(
    tmp_path: Path, attributor: Attributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused at whatever moment, and leaves what is the first's."""
    pytest.importorskip("pyarrow")
    output = tmp_path / "out.parquet"
    attribute_rows(attributor, write(tmp_path / "in.jsonl", GOOD[:1]), output)
    source, read, refused = write(tmp_path / "in.jsonl", GOOD), batch.read_parquet, []

    def second(*_: Any) -> None:
        for errors in (None, tmp_path / "others.jsonl"):
            with pytest.raises(OutputError, match="in use"):
                attribute_rows(attributor, source, output, errors)
            refused.append(errors)

    def read_late(path: Path) -> Any:
        second()  # while the first takes over what is there
        return read(path)

    monkeypatch.setattr(batch, "read_parquet", read_late)
    summary = attribute_rows(attributor, source, output, report=second)
    assert (summary.before, summary.done) == (1, len(GOOD) - 1)
    assert len(refused) == 2 + 2 * len(GOOD)
    assert len(list(heat_fast.read_parquet(output))) == len(GOOD)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.parquet"]


def test_a_journal_that_was_begun_as_a_copy_is_completed(
    tmp_path: Path, attributor: Attributor
) -> None:
    """By a run that was killed while it took over what the output holds."""
    pytest.importorskip("pyarrow")
    output, source = tmp_path / "out.parquet", write(tmp_path / "in.jsonl", GOOD)
    attribute_rows(attributor, source, output)
    first = next(heat_fast.read_parquet(output))
    heat_fast.write_jsonl(first, tmp_path / "out.parquet.partial.jsonl")
    again = attribute_rows(attributor, source, output)
    assert (again.done, again.before) == (0, len(GOOD))
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.parquet"]


@pytest.mark.parametrize("rows", [[], ["", " "], [BAD[0][0], BAD[2][0]]])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_output_of_no_results_can_be_read_and_gone_on_with(
    suffix: str, rows: Rows, tmp_path: Path, attributor: Attributor
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / f"out.{suffix}"
    read = heat_fast.read_parquet if suffix == "parquet" else heat_fast.read_jsonl
    for _ in range(2):
        assert attribute_rows(attributor, source, output).done == 0
        assert list(read(output)) == []
    assert not Path(f"{output}.partial.jsonl").exists()
    assert attribute_rows(attributor, write(source, [*rows, GOOD[0]]), output).done == 1
    assert [each.id for each in read(output)] == ["first"]


def test_rows_in_memory_are_no_source(tmp_path: Path, attributor: Attributor) -> None:
    with pytest.raises(InputError, match="source is list: expected the path"):
        attribute_rows(attributor, GOOD, tmp_path / "out.jsonl")


def test_rows_name_parts_of_their_prompt(tmp_path: Path, attributor: Attributor) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: Rows = [
        {"prompt": "the red ball", "target": "b", "segments": {"colour": "red", "what": "ball"}},
        {"prompt": "the red ball", "target": "b", "segments": {"colour": "red", "what": None}},
        {"prompt": "the red ball", "target": "b", "segments": {"colour": "blue"}},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    for source in (write(tmp_path / "in.jsonl", rows), tmp_path / "in.parquet"):
        output = tmp_path / f"{source.name}.out.jsonl"
        assert attribute_rows(attributor, source, output).failed == 1
        assert (
            "segment 'colour': 'blue' does not occur" in Path(f"{output}.errors.jsonl").read_text()
        )
        first, second = heat_fast.read_jsonl(output)
        assert (first.segments, second.segments) == (
            {"colour": (4, 7), "what": (8, 12)},
            {"colour": (4, 7)},
        )
        assert list(first.by_segment()) == ["colour", "what"]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    named = pyarrow.array([[("colour", "red")], [], None], kind)
    table = pyarrow.table({"prompt": ["the red ball"] * 3, "segments": named})
    parquet.write_table(table, tmp_path / "maps.parquet")
    attribute_rows(attributor, tmp_path / "maps.parquet", tmp_path / "maps.jsonl")
    found = [each.segments for each in heat_fast.read_jsonl(tmp_path / "maps.jsonl")]
    assert found == [{"colour": (4, 7)}, {}, {}]
    ranges = write(tmp_path / "ranges.jsonl", [{"prompt": "abc", "segments": {"b": [1, 2]}}])
    attribute_rows(attributor, ranges, tmp_path / "ranges.out.jsonl")
    (result,) = heat_fast.read_jsonl(tmp_path / "ranges.out.jsonl")
    assert result.by_segment()["b"].text == "b"


# --- stopped and begun again ----------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(0, 3000, 271))
def test_whatever_was_cut_off_is_made_good(
    cut: int, tmp_path: Path, attributor: Attributor
) -> None:
    """The output and the side file as a kill may leave them: cut anywhere."""
    rows = [GOOD[0], BAD[0][0], GOOD[1], BAD[2][0], GOOD[3]]
    source = write(tmp_path / "in.jsonl", rows)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    attribute_rows(attributor, source, whole)
    text, side = whole.read_bytes(), Path(f"{whole}.errors.jsonl").read_bytes()
    share = cut / 3000
    output.write_bytes(text[: round(len(text) * share)])
    # What is written is written in order: the side file has the rows before the cut, at most.
    done = output.read_bytes().count(b"\n")
    ends = [0, *(index + 1 for index, byte in enumerate(side) if byte == 0x0A)]
    Path(f"{output}.errors.jsonl").write_bytes(side[: ends[min(done, 2)]])
    summary = attribute_rows(attributor, source, output)
    assert (summary.before, summary.failed_before) == (done, min(done, 2))
    assert without_times(output) == without_times(whole)
    assert Path(f"{output}.errors.jsonl").read_bytes() == side


def test_another_input_settings_or_file_is_refused(tmp_path: Path, attributor: Attributor) -> None:
    source, output = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    attribute_rows(attributor, source, output)
    before = output.read_bytes()
    other = Attributor(attributor.model, attributor.tokenizer, HeatConfig(variant="gs", seed=3))
    with pytest.raises(ConfigError, match="was begun with seed 0, not 3"):
        attribute_rows(other, source, output)
    changed = write(tmp_path / "changed.jsonl", [GOOD[1], *GOOD[1:]])
    with pytest.raises(InputError, match="row 1 is not the one"):
        attribute_rows(attributor, changed, output)
    with pytest.raises(InputError, match="cannot read"):
        attribute_rows(attributor, tmp_path / "none", output)
    assert output.read_bytes() == before
    heat_fast.write_jsonl([attributor.attribute("a")], output)
    with pytest.raises(InputError, match="results that no batch wrote"):
        attribute_rows(attributor, source, output)
    output.write_text("something\n")
    with pytest.raises(InputError, match="a line that is not JSON"):
        attribute_rows(attributor, source, output)
    assert output.read_text() == "something\n"


def test_another_model_or_dtype_is_refused(tmp_path: Path, attributor: Attributor) -> None:
    source, output = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    attribute_rows(attributor, source, output)
    before = output.read_bytes()
    tokenizer, config = attributor.tokenizer, attributor.config
    other = copy.deepcopy(attributor.model)
    other.name_or_path = "another"
    with pytest.raises(ConfigError, match=r"begun with model_name '.+', not 'another'"):
        attribute_rows(Attributor(other, tokenizer, config), source, output)
    narrow = copy.deepcopy(attributor.model).to(torch.bfloat16)
    with pytest.raises(ConfigError, match="begun with dtype 'float32', not 'bfloat16'"):
        attribute_rows(Attributor(narrow, tokenizer, config), source, output)
    trained = copy.deepcopy(attributor.model)
    with torch.no_grad():
        trained.get_input_embeddings().weight.add_(0.01)
    with pytest.raises(ConfigError, match=r"begun with weights '\w{16}', not '\w{16}'"):
        attribute_rows(Attributor(trained, tokenizer, config), source, output)
    assert output.read_bytes() == before
    # What a reason says of the settings is what a result says of them.
    metadata = attributor.attribute("a").to_dict()["metadata"]
    assert batch._settings(attributor) == batch._settings_of(metadata)


def test_a_folder_is_one_model_however_it_is_spelled(
    tmp_path: Path, attributor: Attributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", [*GOOD, {"prompt": ""}]), tmp_path / "out.jsonl"
    monkeypatch.chdir(tmp_path)
    Path("chat").mkdir()
    Path("link").symlink_to("chat")
    model = copy.deepcopy(attributor.model)
    renamed = Attributor(model, attributor.tokenizer, attributor.config)
    model.name_or_path = "chat"
    attribute_rows(renamed, source, output)
    assert {line["metadata"]["name"] for line in lines(output)} == {"chat"}
    for name in (
        "chat",
        "./chat/",
        str(tmp_path / "chat"),
        "link",
        "../" + tmp_path.name + "/chat",
    ):
        model.name_or_path = name
        again = attribute_rows(renamed, source, output)
        assert (again.done, again.before, again.failed_before) == (0, 4, 1)
    model.name_or_path = "org/chat"  # of the hub
    with pytest.raises(ConfigError, match=r"begun with model_name '.*chat', not 'org/chat'"):
        attribute_rows(renamed, source, output)


def test_a_shortened_input_is_refused(tmp_path: Path, attributor: Attributor) -> None:
    source, output = write(tmp_path / "in.jsonl", GOOD[:3]), tmp_path / "out.jsonl"
    attribute_rows(attributor, source, output)
    before = output.read_bytes()
    with pytest.raises(InputError, match=r"the input has no row 3, which '.+' was begun with"):
        attribute_rows(attributor, write(tmp_path / "short.jsonl", GOOD[:2]), output)
    assert output.read_bytes() == before
    longer = write(tmp_path / "long.jsonl", GOOD)
    assert attribute_rows(attributor, longer, output).done == 1


MARK = {"row": 1, "input": "x"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("out.jsonl", [1]),
        ("out.jsonl", {"a": 1}),
        ("out.jsonl", {"metadata": None}),
        ("out.jsonl", {"metadata": {"batch": MARK}}),
        ("out.jsonl", {"metadata": {"batch": MARK, "config": 1}}),
        ("out.jsonl", {"metadata": {"batch": {"row": "1", "input": "x"}, "config": {}}}),
        ("out.jsonl", {"metadata": {"batch": [1], "config": {}}}),
        ("out.jsonl.errors.jsonl", [1]),
        ("out.jsonl.errors.jsonl", {"a": 1}),
        ("out.jsonl.errors.jsonl", {**MARK, "settings": 1}),
    ],
)
def test_files_that_no_batch_wrote_are_refused(
    name: str, line: Any, tmp_path: Path, attributor: Attributor
) -> None:
    source, place = write(tmp_path / "in.jsonl", GOOD), write(tmp_path / name, [line])
    before = place.read_bytes()
    with pytest.raises(InputError, match=r"holds (results|reasons) that no batch wrote: expected"):
        attribute_rows(attributor, source, tmp_path / "out.jsonl")
    assert place.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("in.csv", "prompt,target\na,b\n"),
        ("in.jsonl.gz", "\x1f"),
        ("in.XLSX", "PK"),
        ("in.json", '[{"prompt": "a"}]'),
        ("in.json", '[\n {"prompt": "a"}\n]'),
        ("in.json", '\n{\n "prompt": "a"\n}'),
    ],
)
def test_another_kind_of_input_is_one_error(
    name: str, text: str, tmp_path: Path, attributor: Attributor
) -> None:
    (tmp_path / name).write_text(text)
    for call in (count_rows, lambda path: attribute_rows(attributor, path, tmp_path / "out.jsonl")):
        with pytest.raises(InputError, match=r"file by its name: .* Parquet .* Convert it first"):
            call(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_another_kind_of_output_is_refused(tmp_path: Path, attributor: Attributor) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    for output, side in (("out.csv", None), ("out.json", None), ("out", tmp_path / "why.xlsx")):
        with pytest.raises(InputError, match=r"file by its name: .* Choose another name"):
            attribute_rows(attributor, source, tmp_path / output, side)
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("name", ["in", "in.txt", "in.2024", "in.ndjson", "in.json"])
def test_json_lines_are_read_whatever_their_name(
    name: str, tmp_path: Path, attributor: Attributor
) -> None:
    source = tmp_path / name
    source.write_text("\n" + write(tmp_path / "rows", GOOD).read_text())
    assert count_rows(source) == 4
    assert attribute_rows(attributor, source, tmp_path / "out").done == 4


def test_rows_come_through_a_pipe(tmp_path: Path) -> None:
    for name in ("rows", "rows.json"):
        os.mkfifo(tmp_path / name)
        with ThreadPoolExecutor(1) as pool:
            pool.submit((tmp_path / name).write_text, '{"prompt": "a"}\n')
            assert [row.fields for row in read_rows(tmp_path / name)] == [{"prompt": "a"}]


def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path: Path, attributor: Attributor) -> None:
    pytest.importorskip("pyarrow")
    source, output = write(tmp_path / "in.jsonl", GOOD), tmp_path / "OUT.PARQUET"
    attribute_rows(attributor, source, output)
    assert output.read_bytes()[:4] == b"PAR1"
    shown = CliRunner().invoke(app, ["show", str(output), "--id", "first"])
    assert shown.exit_code == 0, shown.output


# --- tried again ----------------------------------------------------------------------------------


def test_rows_that_failed_are_tried_again_under_other_settings(
    tmp_path: Path, attributor: Attributor
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x" * 40}, {"prompt": ""}])
    output, side = tmp_path / "out.jsonl", tmp_path / "out.jsonl.errors.jsonl"
    assert attribute_rows(attributor, source, output).failed == 2
    reasons = side.read_bytes()
    again = attribute_rows(attributor, source, output)
    assert (again.failed, again.failed_before) == (0, 2)
    assert side.read_bytes() == reasons
    config = HeatConfig(variant="win", window=16, tail=4, token_budget=64)
    windows = Attributor(attributor.model, attributor.tokenizer, config)
    other = attribute_rows(windows, source, output)
    assert (other.done, other.failed, other.failed_before) == (1, 1, 0)
    # The reasons that were found under the first settings are no longer there.
    assert [(each["row"], each["settings"]["window"]) for each in lines(side)] == [(2, 16)]


def test_reasons_of_an_earlier_version_are_kept(tmp_path: Path, attributor: Attributor) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": ""}])
    output, side = tmp_path / "out.jsonl", tmp_path / "out.jsonl.errors.jsonl"
    attribute_rows(attributor, source, output)
    reason = lines(side)[0]
    del reason["settings"]
    write(side, [reason])
    assert attribute_rows(attributor, source, output).failed_before == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_retry_failed_tries_all_of_them_again(
    suffix: str, tmp_path: Path, attributor: Attributor
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    source = write(tmp_path / "in.jsonl", [{"prompt": ""}, {"prompt": ""}, GOOD[0]])
    output = tmp_path / f"out.{suffix}"
    side = Path(f"{output}.errors.jsonl")
    attribute_rows(attributor, source, output)
    # One of them is mended, which only rows without a result can be.
    write(source, [{"prompt": "ab", "id": "mended"}, {"prompt": ""}, GOOD[0]])
    with pytest.raises(InputError, match="row 1 is not the one"):
        attribute_rows(attributor, source, output)
    again = attribute_rows(attributor, source, output, retry_failed=True)
    assert (again.done, again.failed, again.before, again.failed_before) == (1, 1, 1, 0)
    assert [each["row"] for each in lines(side)] == [2]
    # The result of the row that was tried again stands last, and is found by its row.
    read = heat_fast.read_parquet if suffix == "parquet" else heat_fast.read_jsonl
    assert [each.id for each in read(output)] == ["first", "mended"]
    for row, prompt in (("1", "ab"), ("3", "the red ball")):
        arguments = ["show", str(output), "--id", row, "--json", "-"]
        shown = CliRunner().invoke(app, arguments)
        assert json.loads(shown.stdout)["prompt_text"] == prompt
    shown = CliRunner().invoke(app, ["show", str(output), "--id", "2"])
    assert shown.exit_code == 2
    assert "a row from 1 to 3 that did not fail" in shown.stderr


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (HeatError("out of memory"), False),
        (RuntimeError("device-side assert"), False),
        (NumericalError("not finite"), True),
        (InputError("empty"), True),
    ],
)
def test_what_is_not_the_row_s_fault_is_tried_again(
    error: Exception,
    lasts: bool,
    tmp_path: Path,
    attributor: Attributor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    attribute = attributor.attribute

    def fails(prompt: Any, *arguments: Any, **keywords: Any) -> Any:
        if prompt == "ab":
            raise error
        return attribute(prompt, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(attributor, "attribute", fails)
        first = attribute_rows(attributor, source, output)
    assert (first.done, first.failed) == (3, 1)
    again = attribute_rows(attributor, source, output)
    assert (again.done, again.before, again.failed_before) == (0 if lasts else 1, 3, int(lasts))
    rows = [line["metadata"]["batch"]["row"] for line in lines(output)]
    assert rows == ([1, 2, 4] if lasts else [1, 2, 4, 3])
    assert (tmp_path / "out.jsonl.errors.jsonl").exists() == lasts


# --- processes ------------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path: Path, attributor: Attributor) -> None:
    source, output = write(tmp_path / "in.jsonl", GOOD[:1]), tmp_path / "out.jsonl"

    def second(summary: Summary) -> None:
        with pytest.raises(OutputError, match="being written by another process"):
            attribute_rows(attributor, source, output)

    assert attribute_rows(attributor, source, output, None, second).done == 1


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_it_had_not_been(
    tmp_path: Path, model_folder: str, repository: Path
) -> None:
    random.seed()  # other moments in every run
    count = 40
    rows: Rows = [{"prompt": f"row {number} of the file", "id": number} for number in range(count)]
    rows[3] = rows[17] = {"prompt": ""}
    source = write(tmp_path / "in.jsonl", rows)
    options = ["--model", model_folder, "--variant", "gs", "--token-budget", "64", "--seed", "5"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "heat_fast", "batch", str(source), str(output), *options]
    # The same number of threads as here, for the same rounding.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}

    def finished() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    goals = sorted(random.sample(range(1, count - 8), 3))
    for goal in goals:
        process = subprocess.Popen(command, cwd=repository, env=environment, stderr=subprocess.PIPE)
        limit = time.monotonic() + 240
        while finished() < goal and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))  # anywhere within a row
        process.send_signal(signal.SIGKILL)
        _, words = process.communicate()
        assert process.returncode == -signal.SIGKILL, (goals, goal, words)
    outcome = subprocess.run(command, cwd=repository, env=environment, capture_output=True)
    assert outcome.returncode == 0, outcome.stderr
    assert b"rows were done before" in outcome.stderr
    run = CliRunner().invoke(app, ["batch", str(source), str(whole), *options])
    assert run.exit_code == 0, run.output
    results = without_times(output)
    assert [line["metadata"]["batch"]["row"] for line in results] == [
        number for number in range(1, count + 1) if number not in (4, 18)
    ], goals
    assert results == without_times(whole), goals
    assert lines(Path(f"{output}.errors.jsonl")) == lines(Path(f"{whole}.errors.jsonl"))
