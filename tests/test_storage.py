"""Results in files: JSON and its schema, JSON Lines, pandas, Parquet, and older versions."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import heat_fast
from heat_fast.errors import HeatError, InputError, OutputError
from heat_fast.result import COMPONENTS, Attribution
from heat_fast.storage import (
    SCHEMA_VERSION,
    from_dict,
    json_schema,
    load,
    read_jsonl,
    write_jsonl,
)
from test_result import make

DATA = Path(__file__).parent / "data"
ARRAYS = (*COMPONENTS, "target_log_probs")


def complete(**changes: Any) -> Attribution:
    """A result in which every optional field is there."""
    return make(
        **{
            "curvature_stderr": torch.rand(2, 3),
            "information_skipped": (False, True, False),
            "roles": (None, "user", "user"),
            "id": "first",
        }
        | changes
    )


def same(left: Attribution, right: Attribution) -> None:
    """Every field of the two is the same, to the last bit."""
    assert left.to_dict() == right.to_dict()
    for name in left.array_names():
        assert torch.equal(getattr(left, name), getattr(right, name))


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [make(), complete(), make(text=None, offsets=None)])
def test_what_is_written_follows_the_schema(result: Attribution) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    check = jsonschema.Draft202012Validator(json_schema())
    data = json.loads(json.dumps(result.to_dict()))
    check.validate(data)
    # The schema can say no, field by field.
    for name in data:
        if name != "curvature_stderr":
            assert not check.is_valid({key: data[key] for key in data if key != name}), name
        assert not check.is_valid(data | {name: {"no": "such"}} if name != "metadata" else {}), name
    assert not check.is_valid(data | {"more": 1})


def test_a_real_result_follows_the_schema_and_comes_back(demo: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    result = heat_fast.attribute(demo.model, demo.tokenizer, "Maria slept.", " Yes.", probes=2)
    data = json.loads(json.dumps(result.to_dict()))
    jsonschema.Draft202012Validator(json_schema()).validate(data)
    same(from_dict(data), result)


def test_load_takes_json_as_well(tmp_path: Path) -> None:
    result = complete()
    (tmp_path / "r").write_text(json.dumps(result.to_dict(), indent=1))
    same(load(tmp_path / "r"), result)
    (tmp_path / "r").write_text('{"format": "heat_fast.attribution"')
    with pytest.raises(InputError, match="is damaged: it is not JSON"):
        load(tmp_path / "r")
    (tmp_path / "r").write_text("{}" + " " * 9)
    with pytest.raises(InputError, match="does not describe an attribution"):
        load(tmp_path / "r")


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_version_1_still_loads(suffix: str) -> None:
    result = load(DATA / f"attribution-1.{suffix}")
    assert (result.roles, result.id) == (None, None)
    assert result.template == (False,) * 3
    old = json.loads((DATA / "attribution-1.json").read_text())
    new = result.to_dict()
    assert new.pop("schema_version") == SCHEMA_VERSION
    assert old.pop("schema_version") == 1
    assert {name: new[name] for name in old} == old
    assert new.keys() - old.keys() == {"roles", "id"}


def test_version_1_is_described_by_its_own_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    old = json.loads((DATA / "attribution-1.json").read_text())
    jsonschema.Draft202012Validator(json_schema(1)).validate(old)
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(old)
    for version in (0, SCHEMA_VERSION + 1):
        with pytest.raises(InputError, match=f"expected 1 to {SCHEMA_VERSION}"):
            json_schema(version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "newer heat_fast"),
        ({"gate": [[0.0, "x", 0.0]] * 2}, "damaged"),
        ({"gate": [[0.0]]}, "gate has shape"),
        ({"roles": ["user"]}, "roles has 1 entries"),
        ({"roles": [1, 2, 3]}, "roles is not a list of str"),
        ({"id": 7}, "id is int"),
    ],
)
def test_wrong_mappings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(complete().to_dict() | change)


# --- JSON Lines -----------------------------------------------------------------------------------


def test_json_lines_come_back_one_by_one(tmp_path: Path) -> None:
    results = [complete(id=str(number)) for number in range(3)]
    write_jsonl(iter(results), tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes().count(b"\n") == 3
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write("\n" + "not a result\n")
    lines = read_jsonl(tmp_path / "r.jsonl")
    for result in results:
        same(next(lines), result)
    with pytest.raises(InputError, match=r"line 5 of .*r\.jsonl' is damaged: it is not JSON"):
        next(lines)


def test_json_lines_that_fail_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("old")
    with pytest.raises(InputError, match="cannot write str: expected the results"):
        write_jsonl([make(), "x"], path)  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.jsonl"]
    with pytest.raises(OutputError, match="is a directory"):
        write_jsonl([], tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        read_jsonl(tmp_path / "none")
    with pytest.raises(InputError, match="path is NoneType: expected the name of a file"):
        heat_fast.load(None)  # type: ignore[arg-type]


# --- pandas ---------------------------------------------------------------------------------------


def test_a_data_frame_has_a_row_per_token() -> None:
    pytest.importorskip("pandas")
    result = complete()
    table = result.to_dataframe()
    assert list(table["token"]) == ["<s>", "the", " cat"]
    assert list(table["score"]) == result.scores.tolist()
    assert list(table["curvature"]) == result.aggregated("curvature").tolist()
    assert list(table["template"]) == [True, False, False]
    assert list(table["information_skipped"]) == [False, True, False]
    assert list(table["end"]) == [0, 3, 7]
    assert "target" not in table
    assert make(text=None, offsets=None).to_dataframe()["start"].isna().all()


def test_a_data_frame_per_target_has_a_row_for_each_and_token() -> None:
    pytest.importorskip("pandas")
    result = complete()
    table = result.to_dataframe(per_target=True)
    assert len(table) == 6
    for row in table.itertuples():
        assert row.score == result.target_scores[row.target_index, row.index].item()
        assert row.curvature_stderr == result.curvature_stderr[row.target_index, row.index]  # type: ignore[index]
        assert row.target == result.target_tokens[row.target_index]


@pytest.mark.parametrize("per_target", [False, True])
def test_a_data_frame_has_no_number_for_what_was_not_measured(demo: Any, per_target: bool) -> None:
    pytest.importorskip("pandas")
    result = heat_fast.attribute(demo.model, demo.tokenizer, "The cat", curvature="none")
    table = result.to_dataframe(per_target=per_target)
    empty = {name for name in table if table[name].isna().all() and table[name].dtype == "f4"}
    assert empty == {"curvature", "curvature_stderr"}


# --- Parquet --------------------------------------------------------------------------------------


def test_parquet_gives_everything_back(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    one = make([[0.0, 1.0, 2.0]], id=None)
    bare = make(tokens=("你🙂", "\x00", "b"), text=None, offsets=None)
    results = [complete(), one, bare] * 50  # more than one row group
    heat_fast.write_parquet(iter(results), tmp_path / "r.parquet")
    found = list(heat_fast.read_parquet(tmp_path / "r.parquet"))
    assert len(found) == len(results)
    for left, right in zip(found, results, strict=True):
        same(left, right)


def test_parquet_is_an_ordinary_table(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    result = complete()
    path = tmp_path / "r.parquet"
    heat_fast.write_parquet([result], path, arrays=("gate", "target_scores"))
    table = pandas.read_parquet(path)
    assert list(table["gate"][0]) == result.gate.flatten().tolist()
    assert table["id"][0] == "first"
    assert "curvature" not in table
    with pytest.raises(InputError, match=r"lacks curvature, .*: expected all of them"):
        heat_fast.read_parquet(path)


def test_wrong_parquet_files_and_contents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "r"
    with pytest.raises(InputError, match="there is no file"):
        heat_fast.read_parquet(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="cannot be read as a Parquet file"):
        heat_fast.read_parquet(path)
    parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(InputError, match="a table of something else"):
        heat_fast.read_parquet(path)
    with pytest.raises(InputError, match="Did you mean 'gate'"):
        heat_fast.write_parquet([], path, arrays=("gates",))
    wrong: tuple[Any, ...] = ("gate", 3)
    for arrays in wrong:
        with pytest.raises(InputError, match=rf"arrays={arrays!r}: expected a list of names\. W"):
            heat_fast.write_parquet([], path, arrays=arrays)
    with pytest.raises(InputError, match="lone surrogates"):
        heat_fast.write_parquet([make(tokens=("\udc80", "a", "b"))], path)
    with pytest.raises(InputError, match="cannot write int"):
        heat_fast.write_parquet([1], path)  # type: ignore[list-item]
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("package", ["pandas", "pyarrow"])
def test_without_the_optional_packages(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    calls = {
        "pandas": [lambda: make().to_dataframe()],
        "pyarrow": [
            lambda: heat_fast.write_parquet([make()], tmp_path / "r"),
            lambda: heat_fast.read_parquet(tmp_path / "r"),
        ],
    }
    for call in calls[package]:
        with pytest.raises(HeatError, match=rf"{package} is not installed.*heat-fast\[files\]"):
            call()
    assert os.listdir(tmp_path) == []


def test_a_hundred_results_of_a_thousand_tokens_stay_under_two_megabytes(
    tmp_path: Path, figures: Any
) -> None:
    """With three components; sizes grow with the number of results, as the second file shows."""
    pytest.importorskip("pyarrow")
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    # Words as often as in text: the n-th most frequent one n times more seldom than the first.
    letters = "etaoinshrdlucmfwypvbgk"
    words = [" " + "".join(random.choices(letters, k=random.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 2) for rank in range(len(words))]
    metadata = make().metadata

    def realistic() -> Attribution:
        chosen = random.choices(range(len(words)), weights, k=1000)
        tokens = [words[number] for number in chosen]
        ends = torch.tensor([len(token) for token in tokens]).cumsum(0).tolist()
        # Components spread over orders of magnitude, and every digit of them is noise.
        arrays = {
            name: torch.randn(1, 1000, generator=generator).mul(2).exp() for name in COMPONENTS
        }
        return Attribution(
            **arrays,
            token_ids=tuple(chosen),
            tokens=tuple(tokens),
            offsets=tuple(zip([0, *ends[:-1]], ends, strict=True)),
            prompt_text="".join(tokens),
            special=(False,) * 1000,
            target_ids=(1,),
            target_tokens=(" yes",),
            target_log_probs=torch.tensor([-0.1]),
            metadata=metadata,
        )

    results = [realistic() for _ in range(100)]
    three = ("gate", "curvature", "information")
    sizes = {}
    for name, some, arrays in (
        ("100", results, three),
        ("50", results[:50], three),
        ("all arrays", results, None),
    ):
        heat_fast.write_parquet(some, tmp_path / "r.parquet", arrays=arrays)
        sizes[name] = (tmp_path / "r.parquet").stat().st_size / 1e6
    figures.add(
        "Parquet, 1,000 tokens a result: "
        + ", ".join(f"{name} {size:.2f} MB" for name, size in sizes.items())
    )
    assert sizes["100"] < 2
    assert sizes["100"] < 2.1 * sizes["50"]


def test_a_single_result_is_a_file_of_one_line(tmp_path: Path) -> None:
    write_jsonl(make(), tmp_path / "one.jsonl")
    (read,) = read_jsonl(tmp_path / "one.jsonl")
    same(read, make())


def test_a_change_of_scores_changes_no_result() -> None:
    result = make()
    before = result.to_dict()
    result.scores[0] = 99.0
    assert result.to_dict() == before
