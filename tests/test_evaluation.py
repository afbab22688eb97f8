"""Plans are checked, runs go on where they stopped, tables and tests of significance are right."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import heat_fast
from assertions import assert_close
from heat_fast.cli import app
from heat_fast.datasets import encode, synthetic
from heat_fast.errors import InputError, OutputError
from heat_fast.evaluation import (
    evaluate,
    holm,
    load_plan,
    presets,
    stability,
    summarise,
    write_plots,
    write_tables,
)
from heat_fast.evaluation.measures import MEASURES, Asked, Attributed
from heat_fast.evaluation.plan import PARTS, Entry, make_method, read_data
from heat_fast.evaluation.run import _decode
from heat_fast.evaluation.tables import notes

PLAN = """
[[models]]
name = "embedded"

[[data]]
name = "synthetic"
limit = 3

[[methods]]
name = "heat-gs"

[[methods]]
name = "random"

[[metrics]]
name = "token_f1"

[[metrics]]
name = "dsa"
"""


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    (tmp_path / "plan.toml").write_text(PLAN)
    return load_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize("name", presets())
def test_presets_are_plans(name: str) -> None:
    found = load_plan(name)
    assert found.models[0].name == "embedded"
    assert len(found.methods) >= 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "heat-gs"', 'name = "heat-gx"', "'gs'. Choose one of them"),
        ('name = "heat-gs"', 'name = "heat-gs"\nbetta = 1', "betta"),
        ('name = "random"', 'name = "random"\nsteps = 1', "steps"),
        ('name = "dsa"', 'name = "dsb"', "expected one of .*dsa"),
        ('name = "synthetic"', 'name = "syn"', "expected one of .*synthetic"),
        ("limit", "limits", "limits"),
        ("limit = 3", "limit = 0", "limit of synthetic is 0"),
        ('name = "dsa"', 'name = "dsa"\nk = 3', "dsa has 'k': expected one of seed"),
        ("[[models]]", "[[model]]", "plan has 'model'"),
        ('name = "dsa"', 'name = "token_f1"', "two entries 'token_f1'"),
        ('[[models]]\nname = "embedded"', "", r"no \[\[models\]\]"),
        ("[[models]]", "[[models", "cannot read the plan"),
    ],
)
def test_bad_plans(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_plan(path)


def test_a_missing_plan_names_the_presets() -> None:
    with pytest.raises(InputError, match="quick"):
        load_plan("no-such-plan")


def test_a_stopped_run_goes_on(plan: Any, tmp_path: Path) -> None:
    whole = evaluate(plan, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        evaluate(plan, tmp_path / "cut", stop)
    rows = tmp_path / "cut" / "rows.jsonl"
    assert len(rows.read_text().splitlines()) == 4
    kept = rows.read_bytes()
    rows.write_bytes(kept[:-9])  # as a machine that went off leaves it
    again = evaluate(plan, tmp_path / "cut")
    assert rows.read_bytes().startswith(kept[: kept[:-9].rindex(b"\n") + 1])
    for one, other in zip(whole, again, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [json.loads(line) for line in rows.read_text().splitlines()] == again


def test_a_folder_without_rows_is_free(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text('{"plan"')  # as a machine that went off leaves it
    (tmp_path / "out" / "rows.jsonl").touch()
    assert len(evaluate(plan, tmp_path / "out")) == 6
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["plan"]["models"]


def test_one_run_into_a_folder_at_a_time(plan: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "other.toml").write_text(PLAN.replace("limit = 3", "limit = 2"))
    other = ["evaluate", str(tmp_path / "other.toml"), "--output", str(out), "--quiet"]
    told = r"the folder '.*out' is in use, .* Wait for it, or choose another output\."

    def second(done: int, total: int) -> None:
        before = [each.read_bytes() for each in sorted(out.iterdir())]
        with pytest.raises(OutputError, match=told):
            evaluate(plan, out)
        refused = CliRunner().invoke(app, other)
        assert refused.exit_code == 1
        assert "is in use" in refused.stderr
        assert [each.read_bytes() for each in sorted(out.iterdir())] == before

    rows = evaluate(plan, out, second)
    assert [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] == rows
    assert evaluate(plan, out) == rows  # the folder is free again


def test_another_plan_needs_another_folder(plan: Any, tmp_path: Path) -> None:
    evaluate(plan, tmp_path / "out")
    (tmp_path / "plan.toml").write_text(PLAN.replace("limit = 3", "limit = 2"))
    with pytest.raises(InputError, match="results of another plan"):
        evaluate(load_plan(tmp_path / "plan.toml"), tmp_path / "out")


@pytest.mark.parametrize("label", ["embedded", "other"])
def test_a_run_goes_on_with_the_same_device_and_dtype(
    plan: Any, tmp_path: Path, label: str
) -> None:
    """Rows of another model may be of another dtype."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, tmp_path / "out", stop)
    rows = tmp_path / "out" / "rows.jsonl"
    [row] = [json.loads(line) for line in rows.read_text().splitlines()]
    row |= {"model": label, "dtype": "bfloat16"}
    rows.write_text(json.dumps(row) + "\n")
    if label == "other":
        assert len(evaluate(plan, tmp_path / "out")) == 6
        return
    told = (
        "out' holds rows of embedded on cpu in bfloat16, now it is on cpu in float32: expected "
        "the same, .* Go on with device cpu and dtype bfloat16, or choose another folder"
    )
    with pytest.raises(InputError, match=told):
        evaluate(plan, tmp_path / "out")
    assert len(rows.read_text().splitlines()) == 1


def test_a_finished_run_is_held_to_what_it_was_measured_on(tmp_path: Path) -> None:
    """Nothing is left to measure, and no model is loaded that could tell."""
    data = tmp_path / "data.jsonl"
    (tmp_path / "plan.toml").write_text(
        PLAN.replace('name = "synthetic"', 'name = "wikibio"\npath = "data.jsonl"')
    )
    plan = load_plan(tmp_path / "plan.toml")
    rows = [
        {"prompt": "Ann is", "continuation": "tall."},
        {"prompt": "Bo was", "continuation": "up."},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(plan, tmp_path / "out")
    assert evaluate(plan, tmp_path / "out", device="cpu", dtype="float32") == found
    with pytest.raises(InputError, match="now it is on cpu in float64: expected the same"):
        evaluate(plan, tmp_path / "out", dtype="float64")
    with pytest.raises(InputError, match="now it is on cuda in float32: expected the same"):
        evaluate(plan, tmp_path / "out", device="cuda")
    data.write_text("".join(json.dumps(row | {"prompt": "Bea is"}) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"rows of another '.*' of wikibio: .* another folder"):
        evaluate(plan, tmp_path / "out")


def test_a_folder_that_cannot_be_written(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(InputError, match=r"cannot write into .*file.*: expected a folder"):
            evaluate(plan, place)
    assert (tmp_path / "file").read_text() == ""
    command = ["evaluate", "quick", "--output", str(tmp_path / "file")]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("heat-fast: error: cannot write into")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('name = "random"', 'name = "random"\nseed = "x"', r"methods\]\] random: seed='x'"),
        ('name = "heat-gs"', 'name = "heat-gs"\nprobes = 0', r"methods\]\] heat-gs: probes=0"),
        ('name = "embedded"', 'name = "embedded"\npath = 3', r"path of .*models.* is 3: .*quotes"),
        ("limit = 3", "limit = 3\npath = 5", r"path of .*data.* is 5: .*quotes"),
    ],
)
def test_values_of_a_plan_are_checked_before_it_runs(
    tmp_path: Path, before: str, after: str, told: str
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace(before, after))
    with pytest.raises(InputError, match=told):
        load_plan(tmp_path / "plan.toml")


def test_a_bar_in_a_label_leaves_the_table_whole(tmp_path: Path) -> None:
    given = PLAN.replace('name = "random"', 'name = "random"\nlabel = "a|b"')
    (tmp_path / "plan.toml").write_text(given.replace("limit = 3", "limit = 1"))
    plan = load_plan(tmp_path / "plan.toml")
    write_tables(plan, evaluate(plan, tmp_path / "out"), tmp_path / "out")
    [line] = [
        each for each in (tmp_path / "out/tables.md").read_text().splitlines() if "a\\|b" in each
    ]
    assert line.replace("\\|", "").count("|") == 4


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    long, short = ({"prompt": text, "continuation": "end."} for text in ("word " * 600, "Ann is"))
    data = tmp_path / "data.jsonl"
    (tmp_path / "plan.toml").write_text(
        PLAN.replace('name = "synthetic"', 'name = "wikibio"\npath = "data.jsonl"')
    )
    plan = load_plan(tmp_path / "plan.toml")

    def run(*rows: dict[str, str]) -> tuple[list[bool], str]:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = evaluate(plan, tmp_path / "out")
        return [row["error"] is not None for row in found], (
            tmp_path / "out" / "rows.jsonl"
        ).read_text()

    failed, kept = run(short, long)
    assert failed == [False, False, True, True]
    # What fails as before is not written again; what was measured stays.
    assert run(short, long) == (failed, kept)
    failed, text = run(short, short)
    assert failed == [False] * 4
    assert text.startswith(kept) and len(text.splitlines()) == 6
    assert run(short, short) == (failed, text)


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    row = {"prompt": "Ann is a", "continuation": "painter.", "id": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    text = PLAN.replace('name = "synthetic"', 'name = "wikibio"\npath = "rows.jsonl"')
    (tmp_path / "plan.toml").write_text(text)
    plan = load_plan(tmp_path / "plan.toml")
    rows = evaluate(plan, tmp_path / "out")
    assert rows[0]["values"] == {}
    assert rows[0]["skipped"]["dsa"] == "no evidence is known"
    write_tables(plan, rows, tmp_path / "out")
    told = (tmp_path / "out" / "tables.md").read_text()
    assert "Left out on embedded, wikibio, dsa, 2 times: no evidence is known" in told


def test_an_example_that_fails_stops_nothing(plan: Any, tmp_path: Path) -> None:
    row = {"prompt": "word " * 600, "continuation": "end.", "id": "long"}
    other = {"prompt": "Ann is a", "continuation": "painter.", "id": "short"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, other)))
    text = PLAN.replace('name = "synthetic"', 'name = "wikibio"\npath = "rows.jsonl"')
    (tmp_path / "plan.toml").write_text(text)
    rows = evaluate(load_plan(tmp_path / "plan.toml"), tmp_path / "out")
    assert rows[0]["error"] and not rows[0]["values"]
    assert rows[2]["error"] is None
    told = notes(load_plan(tmp_path / "plan.toml"), rows)
    assert "Left out on embedded, wikibio, example long, every method: the prompt has" in told


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_cells_by_hand(plan: Any) -> None:
    """Ten pairs, the first method ahead in all: p = 2 / 2^10, twice for two tests."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    rows = [
        {
            "model": "embedded",
            "data": "synthetic",
            "method": method,
            "example": str(number),
            "values": {"token_f1": level + number / 100, "dsa": level * (1 + number / 10)},
            "skipped": {},
            "error": None,
        }
        for method, level in (("heat-gs", 0.5), ("random", 0.25))
        for number in range(10)
    ]
    cells = {(cell.method, cell.metric): cell for cell in summarise(plan, rows)}
    assert cells["heat-gs", "token_f1"].mean == pytest.approx(0.545)
    assert cells["heat-gs", "token_f1"].best and not cells["random", "token_f1"].best
    assert cells["heat-gs", "dsa"].p is None
    assert cells["random", "dsa"].p == pytest.approx(2 * 2 / 2**10)
    assert cells["random", "dsa"].count == 10


def test_the_command_writes_tables(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    (tmp_path / "plan.toml").write_text(PLAN)
    out = tmp_path / "out"
    command = ["evaluate", str(tmp_path / "plan.toml"), "--output", str(out)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert "| heat-gs | " in outcome.output
    assert CliRunner().invoke(app, [*command, "--quiet"]).output == ""
    assert r"\begin{tabular}{lrr}" in (out / "tables.tex").read_text()
    assert r"token\_f1" in (out / "tables.tex").read_text()
    values = pandas.read_parquet(out / "values.parquet")
    assert len(values) == 12
    kept = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert values["value"][0] == kept[0]["values"][values["metric"][0]]
    wrong = CliRunner().invoke(app, ["evaluate", "no-such-plan", "--output", str(out)])
    assert wrong.exit_code == 2


def test_a_model_that_is_not_there(plan: Any, tmp_path: Path) -> None:
    other = dataclasses.replace(
        plan, models=(Entry("gone", "gone", {"path": str(tmp_path / "gone")}),)
    )
    with pytest.raises(InputError, match=r"there is no model folder .*gone"):
        evaluate(other, tmp_path / "out")
    unknown = dataclasses.replace(plan, models=(Entry("gone", "gone", {"path": "nobody/gone"}),))
    with pytest.raises(InputError, match=r"cannot load the model 'nobody/gone'"):
        evaluate(unknown, tmp_path / "out")


@pytest.mark.parametrize("gone", ["./gone", "/gone/model", "gone/", "some/where/gone"])
def test_all_models_are_looked_for_before_the_first_is_run(
    gone: str, tmp_path: Path, model_folder: str
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    out = tmp_path / "out"
    models = ["--model", model_folder, "--model", gone]
    command = ["evaluate", str(tmp_path / "plan.toml"), *models, "--output", str(out)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 2
    assert f"there is no model folder {gone!r}" in outcome.stderr
    with pytest.raises(InputError, match="there is no model folder"):
        evaluate(load_plan(tmp_path / "plan.toml", models=[model_folder, gone]), out)
    assert not out.exists()


def test_models_are_loaded_by_the_caller(plan: Any, tmp_path: Path) -> None:
    asked = []

    def load(name: str | None) -> tuple[Any, Any]:
        asked.append(name)
        demo = heat_fast.load_demo_model(1)
        return demo.model, demo.tokenizer

    rows = evaluate(plan, tmp_path / "out", load=load)
    assert asked == [None] and all(row["values"] for row in rows)
    # Nothing is left to do: nothing is loaded.
    assert evaluate(plan, tmp_path / "out", load=load) == rows and asked == [None]


def test_a_plan_on_other_models_and_data(tmp_path: Path, monkeypatch: Any) -> None:
    row = {"prompt": "Ann is a", "continuation": "painter.", "id": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    plan = load_plan("decoding", models=["org/name"], data=["wikibio=rows.jsonl"], limit=7)
    assert [(each.label, each.settings) for each in plan.models] == [("name", {"path": "org/name"})]
    assert len(plan.data) == 55
    assert plan.data[0].settings["path"] == str(tmp_path / "rows.jsonl")
    assert all(each.settings["limit"] == 7 for each in plan.data)
    kept = load_plan("quick", data=["wikibio=$FOLDER/rows.jsonl"])
    monkeypatch.setenv("FOLDER", str(tmp_path))
    assert len(read_data(kept.data[0], kept.folder)) == 1
    monkeypatch.delenv("FOLDER")
    with pytest.raises(InputError, match="variable that is not set"):
        read_data(kept.data[0], kept.folder)


def test_the_curated_set_is_read_of_two_files(tmp_path: Path, monkeypatch: Any) -> None:
    question = {"support": "Iron rusts.", "question": "What rusts?", "correct_answer": "iron"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "stories.jsonl").write_text(json.dumps({"paragraph": "Tom went home."}) + "\n")
    monkeypatch.chdir(tmp_path)
    plan = load_plan("quick", data=["curated=questions.jsonl,narratives=stories.jsonl"], limit=1)
    [entry] = plan.data
    assert entry.settings["path"] == str(tmp_path / "questions.jsonl")
    [example] = read_data(entry, plan.folder)
    assert example.prompt.startswith("Tom went home.") and "Iron rusts." in example.prompt
    assert load_plan("quick", data=["curated=$F/a,narratives=$F/b"]).data[0].settings == {
        **entry.settings,
        "path": "$F/a",
        "narratives": "$F/b",
        "limit": 20,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("curated=", "expected NAME=PATH, curated=PATH,narratives=PATH, or synthetic"),
        ("curated=a,narratives=", "expected NAME=PATH, curated=PATH,narratives=PATH"),
        ("curated=,narratives=b", "expected NAME=PATH, curated=PATH,narratives=PATH"),
        ("synthetic=a", "synthetic or restated alone"),
        ("sciq=a,narratives=b", "sciq has narratives: expected them only of curated"),
    ],
)
def test_bad_data_options(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_plan("quick", data=[given])


def test_parts_of_a_score() -> None:
    """`gate * (curvature + information) / 2` of components that each sum to 1."""
    demo = heat_fast.load_demo_model(1)
    [example] = synthetic(1)
    encoded = encode(example, demo.tokenizer)
    found = {}
    for part in PARTS:
        settings = {"part": part, "probes": 1, "normalize": "sum"}
        method = make_method(Entry("heat-full", part, settings))
        result = method(demo.model, demo.tokenizer, list(encoded.token_ids), [encoded.target_id])
        found[part] = result.scores
    mixed = sum(found[name] / found[name].sum() for name in ("curvature", "information")) / 2
    assert_close("without gate", mixed, found["ungated"], rtol=1e-5)
    assert_close("with gate", found["gate"] * mixed, found["score"], rtol=1e-5)
    with pytest.raises(InputError, match="part of x has 'gates': expected one of curvature, gate"):
        make_method(Entry("heat-full", "x", {"part": "gates"}))


def test_decodings_that_draw_the_same_token_are_measured_once(tmp_path: Path) -> None:
    text = PLAN.replace("limit = 3", "limit = 1\ndecodings = [{ temperature = 0.01 }]")
    (tmp_path / "plan.toml").write_text(text)
    plan = load_plan(tmp_path / "plan.toml")
    assert [each.label for each in plan.data] == ["synthetic", "synthetic: temperature 0.01"]
    rows = evaluate(plan, tmp_path / "out")
    assert [row["data"] for row in rows] == [each.label for each in plan.data for _ in range(2)]
    greedy, drawn = rows[:2], rows[2:]
    for one, other in zip(greedy, drawn, strict=True):
        # Seconds would differ, were it measured again.
        assert {**one, "data": ""} == {**other, "data": ""}
    changes = stability(plan, rows)
    assert {(cell.data, cell.method, cell.mean) for cell in changes} == {
        ("synthetic", "heat-gs", 0.0),
        ("synthetic", "random", 0.0),
    }
    assert {cell.data for cell in summarise(plan, rows)} == {"synthetic"}
    write_tables(plan, rows, tmp_path / "out")
    assert "Largest relative change" in (tmp_path / "out" / "tables.md").read_text()


def test_draws_of_examples_are_their_own_and_ignore_the_models_settings() -> None:
    demo = heat_fast.load_demo_model(1)
    demo.model.generation_config.repetition_penalty = 5.0
    found = []
    for example in synthetic(8):
        encoded = encode(example, demo.tokenizer)

        def decoded(settings: dict[str, Any], example: Any = example, ids: Any = encoded) -> Any:
            return _decode(demo.model, demo.tokenizer, example.id, ids.token_ids, settings)

        assert decoded({}) == (encoded.target_id,)
        found.append(decoded({"temperature": 20.0}))
        assert found[-1] == decoded({"temperature": 20.0})
    assert len(set(found)) > 4


@pytest.mark.parametrize(
    "chosen", ['"gird"', "[0.8]", "[{}]", "3", "[{ temprature = 0.8 }]", '"few"\ntargets = "all"']
)
def test_bad_decodings(tmp_path: Path, chosen: str) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace("limit = 3", f"decodings = {chosen}"))
    with pytest.raises(InputError, match="synthetic"):
        load_plan(tmp_path / "plan.toml")


def test_changes_by_hand(tmp_path: Path) -> None:
    """A mean of 2 becomes 3 and 1.5: at most 50 %; an example without a value counts nowhere."""
    text = PLAN.replace("limit = 3", 'limit = 3\ndecodings = "few"')
    (tmp_path / "plan.toml").write_text(text)
    plan = load_plan(tmp_path / "plan.toml")
    values = {"a": (1.0, 2.0, 1.0), "b": (3.0, 4.0, 2.0), "c": (9.0, None, 9.0)}
    rows = [
        {
            "model": "embedded",
            "data": entry.label,
            "method": "heat-gs",
            "example": example,
            "values": {} if found[at] is None else {"dsa": found[at]},
        }
        for at, entry in enumerate(plan.data)
        for example, found in values.items()
    ]
    [cell] = stability(plan, rows)
    assert (cell.metric, cell.mean, cell.count) == ("dsa", 50.0, 2)


def test_log_ratios_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    (tmp_path / "plan.toml").write_text(PLAN.replace('"dsa"', '"soft_nc"'))
    rows = [
        {
            "model": "embedded",
            "data": "synthetic",
            "method": method,
            "example": str(number),
            "values": {"soft_nc": value},
        }
        for method, values in (("heat-gs", (0.6, 0.8)), ("random", (0.2, 0.5)))
        for number, value in enumerate(values)
    ]
    cells = summarise(load_plan(tmp_path / "plan.toml"), rows)
    [ratio] = [cell for cell in cells if cell.metric == "log (soft_nc / random)"]
    assert ratio.method == "heat-gs" and ratio.best
    assert ratio.mean == pytest.approx(math.log(2))


def test_metrics_that_ask_the_method_again() -> None:
    """Every metric gives a finite value of a synthetic example, within its range."""
    demo = heat_fast.load_demo_model(1)
    [example] = synthetic(1)
    encoded = encode(example, demo.tokenizer)
    asked = Asked(demo.model, demo.tokenizer, example, encoded, (encoded.target_id,))
    method = make_method(Entry("heat-win", "heat", {"window": 64, "tail": 8, "probes": 1}))
    prompt = list(encoded.token_ids)
    one = Attributed(asked, method, method(demo.model, demo.tokenizer, prompt, [encoded.target_id]))
    found = {}
    for name, known in MEASURES.items():
        settings = {"samples": 2} if name == "sensitivity" else {}
        settings |= {"masks": 2} if name.startswith("soft") else {}
        found[name] = known.measure(one, settings).value
    assert all(math.isfinite(value) for value in found.values()), found
    assert 0 < found["sensitivity"] < 1 and 0 < found["window_leakage"] < 1
    assert -1 <= found["rephrasing"] <= 1


def test_forms_of_a_synthetic_prompt() -> None:
    """Swapped: the evidence's tokens but the answer stay. Rephrased: every token has a partner."""
    demo = heat_fast.load_demo_model(1)
    for example in synthetic(10):
        encoded = encode(example, demo.tokenizer)
        asked = Asked(demo.model, demo.tokenizer, example, encoded, (encoded.target_id,))
        other = asked.swapped
        apart = [
            at
            for at, pair in enumerate(zip(encoded.token_ids, other.token_ids, strict=True))
            if pair[0] != pair[1]
        ]
        assert len(apart) == 2 and len(set(apart) & set(encoded.evidence)) == 1
        assert {encoded.token_ids[at] for at in apart} == {other.token_ids[at] for at in apart}
        assert encoded.target_id != other.target_id
        form, pairs = asked.rephrased
        assert form.target_id == encoded.target_id
        assert len(pairs) == len({at for at, _ in pairs}) == len({at for _, at in pairs})
        assert len(encoded.token_ids) - len(pairs) <= 1  # the begin token
        for at, there in pairs:
            read = [
                demo.tokenizer.decode([ids[place]]).strip()
                for ids, place in ((encoded.token_ids, at), (form.token_ids, there))
            ]
            assert read[0] == read[1]


def test_plots(plan: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("scipy", reason="scipy is not installed")
    rows = evaluate(plan, tmp_path / "out")
    files = write_plots(plan, summarise(plan, rows), tmp_path)
    assert [path.name for path in files] == ["embedded-synthetic.png", "embedded-synthetic.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    first = files[1].read_bytes()
    assert b"token_f1" in first or b"<svg" in first
    write_plots(plan, summarise(plan, rows), tmp_path)
    assert files[1].read_bytes() == first, "the same numbers make another file"
