"""Plans are checked, runs go on where they stopped, tables and tests of significance are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from heat_fast.cli import app
from heat_fast.errors import InputError
from heat_fast.evaluation import evaluate, holm, load_plan, presets, summarise, write_tables

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
        ('name = "heat-gs"', 'name = "heat-gx"', "Known names: full, gs"),
        ('name = "heat-gs"', 'name = "heat-gs"\nbetta = 1', "betta"),
        ('name = "random"', 'name = "random"\nsteps = 1', "steps"),
        ('name = "dsa"', 'name = "dsb"', "expected one of .*dsa"),
        ('name = "synthetic"', 'name = "syn"', "expected one of .*synthetic"),
        ("limit", "limits", "limits"),
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


def test_another_plan_needs_another_folder(plan: Any, tmp_path: Path) -> None:
    evaluate(plan, tmp_path / "out")
    (tmp_path / "plan.toml").write_text(PLAN.replace("limit = 3", "limit = 2"))
    with pytest.raises(InputError, match="results of another plan"):
        evaluate(load_plan(tmp_path / "plan.toml"), tmp_path / "out")


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
    assert "Left out on wikibio, dsa, 2 times: no evidence is known" in told


def test_an_example_that_fails_stops_nothing(plan: Any, tmp_path: Path) -> None:
    row = {"prompt": "word " * 600, "continuation": "end.", "id": "long"}
    other = {"prompt": "Ann is a", "continuation": "painter.", "id": "short"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, other)))
    text = PLAN.replace('name = "synthetic"', 'name = "wikibio"\npath = "rows.jsonl"')
    (tmp_path / "plan.toml").write_text(text)
    rows = evaluate(load_plan(tmp_path / "plan.toml"), tmp_path / "out")
    assert rows[0]["error"] and not rows[0]["values"]
    assert rows[2]["error"] is None


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
    command = ["evaluate", str(tmp_path / "plan.toml"), "--output", str(out), "--quiet"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert "| heat-gs | " in outcome.output
    assert r"\begin{tabular}{lrr}" in (out / "tables.tex").read_text()
    assert r"token\_f1" in (out / "tables.tex").read_text()
    values = pandas.read_parquet(out / "values.parquet")
    assert len(values) == 12
    kept = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert values["value"][0] == kept[0]["values"][values["metric"][0]]
    wrong = CliRunner().invoke(app, ["evaluate", "no-such-plan", "--output", str(out)])
    assert wrong.exit_code == 2
