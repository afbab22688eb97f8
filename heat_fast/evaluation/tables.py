"""Means, standard errors and paired significance of an evaluation; Markdown, LaTeX, Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heat_fast.errors import HeatError
from heat_fast.evaluation.measures import MEASURES
from heat_fast.evaluation.plan import Plan
from heat_fast.metrics import Measurement


@dataclass(frozen=True)
class Cell:
    """One method by one metric on one data set of one model.

    p: of the paired Wilcoxon signed-rank test against the first method, two-sided, corrected by
    Holm's method over all tests of the evaluation; None for the first method, and where no pair
    differs. best: the best mean of its column.
    """

    model: str
    data: str
    method: str
    metric: str
    count: int
    mean: float
    stderr: float | None
    p: float | None
    best: bool


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: `max_{j <= i} min(1, (m - j) p_j)` in rising order.

    (Holm 1979.)

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[at]))
        found[at] = least
    return found


def summarise(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells of all tables, in the order of the plan. Examples lacking a value are left out."""
    values: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        for metric, value in row["values"].items():
            key = (row["model"], row["data"], row["method"], metric)
            values.setdefault(key, {})[row["example"]] = value
    first = plan.methods[0].label
    better = {each.label: MEASURES[each.name].better for each in plan.metrics}
    tests = {}
    for key, found in values.items():
        model, data, method, metric = key
        rival = values.get((model, data, first, metric), {})
        shared = [name for name in found if name in rival]
        apart = [found[name] - rival[name] for name in shared]
        if method != first and any(apart):
            tests[key] = _wilcoxon(apart)
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    measured = {key: Measurement.of(list(found.values())) for key, found in values.items()}
    cells = []
    for key, own in measured.items():
        model, data, method, metric = key
        column = [
            each.value
            for other, each in measured.items()
            if (other[0], other[1], other[3]) == (model, data, metric)
        ]
        best = max(column) if better[metric] == "higher" else min(column)
        cells.append(
            Cell(
                *key,
                count=len(own),
                mean=own.value,
                stderr=own.stderr,
                p=corrected.get(key),
                best=own.value == best,
            )
        )
    return cells


def _wilcoxon(apart: Sequence[float]) -> float:
    try:
        from scipy.stats import wilcoxon
    except ImportError as error:
        raise HeatError(
            f"scipy is not installed ({error}): expected it for significance. Install it with pip "
            "install 'heat-fast[evaluation]'."
        ) from error
    # Pairs without a difference count half to either side.
    return float(wilcoxon(apart, zero_method="zsplit").pvalue)


def markdown(plan: Plan, cells: Sequence[Cell]) -> str:
    """One table per model and data set: methods by metrics."""
    return "\n\n".join(
        f"**{model}, {data}**, n = {_counts(some)}\n\n"
        + _rows(plan, some, _plain, "| ", " | ", " |")
        for (model, data), some in _groups(cells).items()
    )


def latex(plan: Plan, cells: Sequence[Cell]) -> str:
    """The same for LaTeX, with booktabs."""
    found = []
    for (model, data), some in _groups(cells).items():
        lines = _rows(plan, some, _tex, "", " & ", r" \\").splitlines()
        head, body = lines[0], lines[2:]
        columns = "l" + "r" * head.count("&")
        found.append(
            f"% {model}, {data}, n = {_counts(some)}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
            + head.replace("_", r"\_")
            + "\n\\midrule\n"
            + "\n".join(body)
            + "\n\\bottomrule\n\\end{tabular}"
        )
    return "\n\n".join(found) + "\n"


def _groups(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.data), []).append(cell)
    return found


def _counts(cells: Sequence[Cell]) -> str:
    counts = sorted({cell.count for cell in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _rows(plan: Plan, cells: Sequence[Cell], show: Any, left: str, middle: str, right: str) -> str:
    found = {(cell.method, cell.metric): cell for cell in cells}
    shown = [each.label for each in plan.metrics if any(each.label == one[1] for one in found)]
    lines = [["", *shown], ["---"] * (len(shown) + 1)]
    for method in plan.methods:
        row = [found.get((method.label, metric)) for metric in shown]
        lines.append([method.label, *(show(cell) if cell else "" for cell in row)])
    return "\n".join(left + middle.join(line) + right for line in lines)


def _mark(cell: Cell) -> str:
    """An asterisk where it differs from the first method at 5 %."""
    return "*" if cell.p is not None and cell.p < 0.05 else ""


def _plain(cell: Cell) -> str:
    mean = f"**{cell.mean:.3f}**" if cell.best else f"{cell.mean:.3f}"
    return mean + ("" if cell.stderr is None else f" ± {cell.stderr:.3f}") + _mark(cell)


def _tex(cell: Cell) -> str:
    mean = rf"\mathbf{{{cell.mean:.3f}}}" if cell.best else f"{cell.mean:.3f}"
    error = "" if cell.stderr is None else rf" \pm {cell.stderr:.3f}"
    return f"${mean}{error}{'^*' if _mark(cell) else ''}$"


def notes(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """What the tables leave out and why, and what their marks mean."""
    lines = [
        f"Mean ± standard error (bootstrap over examples); bold: best; *: differs from "
        f"{plan.methods[0].label} (paired Wilcoxon signed-rank, p < 0.05 after Holm's correction).",
    ]
    left: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for metric, reason in row["skipped"].items():
            left[row["data"], metric, reason] = left.get((row["data"], metric, reason), 0) + 1
        if row["error"]:
            key = (row["data"], row["method"], row["error"])
            left[key] = left.get(key, 0) + 1
    lines += [f"Left out on {d}, {m}, {n} times: {why}" for (d, m, why), n in left.items()]
    return "\n".join(f"- {line}" for line in lines)


def write_tables(
    plan: Plan, rows: Sequence[dict[str, Any]], output: str | os.PathLike[str]
) -> list[Cell]:
    """`tables.md`, `tables.tex`, and `values.parquet` and `cells.parquet` where pandas is there.

    Raises `HeatError` where scipy is not installed.
    """
    folder, cells = Path(output), summarise(plan, rows)
    below = notes(plan, rows) + _write_parquet(rows, cells, folder)
    (folder / "tables.md").write_text(f"{markdown(plan, cells)}\n\n{below}\n", encoding="utf-8")
    (folder / "tables.tex").write_text(latex(plan, cells), encoding="utf-8")
    return cells


def _write_parquet(rows: Sequence[dict[str, Any]], cells: Sequence[Cell], folder: Path) -> str:
    """All values and all cells; without pandas and pyarrow, a note that they are not there."""
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        return (
            f"\n- No Parquet files: {error}. pip install 'heat-fast[files]' brings what they need."
        )
    names = ("model", "data", "method", "example")
    values = [
        {**{name: row[name] for name in names}, "metric": metric, "value": value}
        for row in rows
        for metric, value in row["values"].items()
    ]
    pandas.DataFrame(values).to_parquet(folder / "values.parquet")
    pandas.DataFrame([vars(cell) for cell in cells]).to_parquet(folder / "cells.parquet")
    return ""
