"""The benchmarks' scripts run, and what is committed of them is what they make."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script(name)`: a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_pages_are_made_of_the_results(script: Any) -> None:
    page = script("page")
    texts = [path.read_text() for path in page.PAGES]
    assert sum(len(page.PART.findall(text)) for text in texts) == len(page.PARTS)
    assert [page.page(text) for text in texts] == texts, "run 'make plots'"


def test_tables_of_a_gpu_are_made_of_its_rows(script: Any) -> None:
    script("page")  # it knows the way to bench/gpu
    tables = script("tables")
    assert tables.folders()
    for folder in tables.folders():
        assert tables.page(folder) == (folder / "tables.md").read_text(), "run 'make plots'"


def test_a_components_seconds_are_those_of_its_visits(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows, one after the other, and a clock that tells how long each report took."""
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    paper, now = script("test_bench_paper"), [0.0]
    monkeypatch.setattr(paper.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(paper.torch.cuda, "is_available", lambda: False)
    sample = paper.Sample("curvature", limit=9.0)
    reports = [("total", 0, 0.0), ("trunk", 0, 1.0), ("trunk", 2, 3.0), ("curvature", 0, 0.5)]
    reports += [("curvature", 4, 5.0), ("total", 1, 0.1), ("trunk", 2, 0.1), ("trunk", 4, 3.0)]
    for component, done, took in [*reports, ("curvature", 4, 0.5)]:
        now[0] += took
        sample(component, done, 8)
    assert sample.found["trunk"][:2] == (pytest.approx(6.0), 4)
    assert sample.found["curvature"] == (pytest.approx(5.0), 4, 8, False)
    now[0] += 5.0
    with pytest.raises(paper.Enough):
        sample("curvature", 6, 8)


def test_the_paper_is_under_the_floor(script: Any) -> None:
    """Figures as committed; GPT-J-6B's information by hand, from its weights alone."""
    found = script("paper_floor").rows()
    kept = json.loads((BENCH / "results" / "paper-floor.json").read_text())
    assert found == kept["rows"]
    row = next(each for each in found if each["table"] == 15)
    weights = 28 * 12 * 4096**2  # of one row through all blocks
    suffixes = 1024 * 1025 // 2
    assert row["flops"]["information"] > 2 * weights * suffixes * 0.9
    assert min(each["times_under_information"] for each in found) > 5


def test_slopes_are_those_of_powers(script: Any) -> None:
    slope = script("scaling").slope
    x = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert slope(x, [3 * value**2 for value in x]) == pytest.approx(2)
    assert slope(x, [value + 100 * (value < 8) for value in x]) == pytest.approx(1)


def test_a_curve_is_measured() -> None:
    environment = {**os.environ, "HEAT_FAST_BENCH": "small"}
    command = [sys.executable, str(BENCH / "scaling.py"), "codes"]
    outcome = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, timeout=300
    )
    assert outcome.stdout.splitlines()[-1].startswith("codes: slopes seconds ")


def test_products_are_measured_beside_torchs() -> None:
    told = subprocess.run(
        [sys.executable, str(BENCH / "products.py")],
        env={**os.environ, "HEAT_FAST_BENCH": "small"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(told.stdout)
    (run,) = report["attributions"]
    assert run["shape"] == "tiny" and run["seconds"] > 0 < run["seconds_torch"]
    assert all(report["layers"][0][name] > 0 for name in ("forward", "adjoint_torch"))


def test_a_comparison_names_an_unknown_base() -> None:
    command = [sys.executable, str(BENCH / "compare.py"), "no-such-revision"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert "no-such-revision" in outcome.stderr


def test_a_comparison_takes_turns(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compare = script("compare")
    order: list[str] = []

    def run(who: str, seconds: float) -> dict[str, float]:
        order.append(who)
        return dict.fromkeys(compare.WORKLOADS, seconds)

    ratios = compare.compare(lambda: run("base", 3.0), lambda: run("mine", 1.5), 2)
    assert order == ["base", "mine", "mine", "base"]
    assert all(values == [2.0, 2.0] for values in ratios.values())


def test_one_method_of_an_evaluation_is_measured_anew(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the committed values, without rows; a row that lacks a metric is measured as well."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from heat_fast import baselines
    from heat_fast.evaluation import evaluate, load_plan, write_tables

    parts = {
        "models": ["embedded"],
        "data": ["synthetic"],
        "methods": ["attention_rollout", "random"],
        "metrics": ["token_f1", "dsa"],
    }
    text = [f'[[{part}]]\nname = "{name}"' for part, names in parts.items() for name in names]
    (tmp_path / "plan.toml").write_text("\n".join(text))
    plan, folder = load_plan(tmp_path / "plan.toml", limit=2), tmp_path / "out"
    rows = evaluate(plan, folder)
    write_tables(plan, rows, folder)
    values = pandas.read_parquet(folder / "values.parquet")
    values.drop(values.index[0]).to_parquet(folder / "values.parquet")
    (folder / "rows.jsonl").unlink()

    forget = script("evaluations").forget
    assert not forget(folder, ["faml"]) and not (folder / "rows.jsonl").exists()
    assert forget(folder, ["random", "faml"])
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 1
    asked = []
    for name in parts["methods"]:
        kind = type(baselines.get(name))
        monkeypatch.setattr(kind, "scores", _told(kind.scores, name, asked))
    again = evaluate(plan, folder)
    assert sorted(asked) == ["attention_rollout", "random", "random"]
    assert [row["values"] for row in again] == [row["values"] for row in rows]
    # What is measured by now is kept where rows are there.
    assert forget(folder, ["random"])
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 2


def _told(scores: Any, name: str, asked: list[str]) -> Any:
    def run(self: Any, case: Any) -> Any:
        asked.append(name)
        return scores(self, case)

    return run


def test_a_search_for_tiles_climbs_to_the_fastest_and_leaves_the_table_as_it_was(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    search, trials = script("test_bench_tiles"), script("tiles")
    shipped = trials.importlib.import_module("heat_fast.kernels.second_order_attention.tiles")
    begin = shipped.Tile(16, 32, 1, 4, 2)

    def taken(tile: Any) -> float:  # 64 rows and 8 warps are best, 3 stages do not fit
        if tile.stages > 2:
            return float("inf")
        return abs(tile.rows - 64) + abs(tile.warps - 8) + tile.columns + 100 * tile.probes + 1.0

    prepared: list[Any] = []
    best, seconds = search.climb(begin, prepared.extend, taken)
    assert best == shipped.Tile(64, 16, 1, 8, best.stages)
    assert seconds == 117.0
    assert len(set(prepared)) == len(prepared)
    assert best in prepared

    trial = trials.Trial(None, shipped.KEYS, 0, shipped.KEYS[80], 96)
    with monkeypatch.context() as patch:
        patch.delitem(shipped.KEYS, 0, raising=False)
        trial.put(begin)
        device = search.torch.device("cpu")
        assert shipped.of(shipped.KEYS, device, 80) == begin
        assert shipped.of(shipped.KEYS, device, 128) == shipped.KEYS[80][128]
        del shipped.KEYS[0]

    row = {"operation": "flow", "table": "_FLOW", "model": "m", "length": 2048, "dtype": "bfloat16"}
    row |= {"shipped": {"rows": 16}, "best": {"rows": 64}, "shipped_seconds": 0.002}
    lines = script("tables").tiles([{**row, "ratio": 1.5, "tried": [{}, {}]}])
    assert "| rows 16 | 2.000 | rows 64 | 1.50 | 2 |" in lines[-1]
