"""The tables of an evaluation: Markdown, LaTeX, Parquet."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heat_fast.evaluation.cells import Cell, columns, grouped, stability, summarise
from heat_fast.evaluation.plan import Plan


def markdown(plan: Plan, cells: Sequence[Cell]) -> str:
    """One table per model and data set: methods by metrics."""
    return "\n\n".join(
        f"**{model}, {data}**, n = {_counts(some)}\n\n"
        + _rows(plan, some, _plain, "| ", " | ", " |", _barred)
        for (model, data), some in grouped(cells).items()
    )


def latex(plan: Plan, cells: Sequence[Cell]) -> str:
    """The same for LaTeX, with booktabs."""
    found = []
    for (model, data), some in grouped(cells).items():
        lines = _rows(plan, some, _tex, "", " & ", r" \\", _escaped).splitlines()
        head, body = lines[0], lines[2:]
        columns = "l" + "r" * head.count("&")
        found.append(
            f"% {model}, {data}, n = {_counts(some)}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
            + head
            + "\n\\midrule\n"
            + "\n".join(body)
            + "\n\\bottomrule\n\\end{tabular}"
        )
    return "\n\n".join(found) + "\n"


def _counts(cells: Sequence[Cell]) -> str:
    counts = sorted({cell.count for cell in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _rows(
    plan: Plan,
    cells: Sequence[Cell],
    show: Any,
    left: str,
    middle: str,
    right: str,
    named: Callable[[str], str] = str,
) -> str:
    found = {(cell.method, cell.metric): cell for cell in cells}
    shown = [each for each in columns(plan) if any(each == one[1] for one in found)]
    digits = {name: _digits([c.mean for c in cells if c.metric == name]) for name in shown}
    lines = [["", *map(named, shown)], ["---"] * (len(shown) + 1)]
    for method in plan.methods:
        row = [found.get((method.label, metric)) for metric in shown]
        lines.append(
            [
                named(method.label),
                *(show(cell, digits[cell.metric]) if cell else "" for cell in row),
            ]
        )
    return "\n".join(left + middle.join(line) + right for line in lines)


def _mark(cell: Cell) -> str:
    """An asterisk where it differs from the first method at 5 %."""
    return "*" if cell.p is not None and cell.p < 0.05 else ""


def _barred(label: str) -> str:
    """A label as a Markdown table reads it."""
    return label.replace("|", r"\|")


def _escaped(label: str) -> str:
    """A label as LaTeX reads it."""
    return "".join("\\" + sign if sign in "_&%#$" else sign for sign in label)


def _digits(means: Sequence[float]) -> int:
    """Digits after the point: three of the largest value, and at least three in all."""
    largest = max((abs(mean) for mean in means if math.isfinite(mean)), default=0.0)
    return 3 if largest == 0 else max(3, 2 - math.floor(math.log10(largest)))


def _plain(cell: Cell, digits: int) -> str:
    mean = f"**{cell.mean:.{digits}f}**" if cell.best else f"{cell.mean:.{digits}f}"
    return mean + ("" if cell.stderr is None else f" ± {cell.stderr:.{digits}f}") + _mark(cell)


def _tex(cell: Cell, digits: int) -> str:
    mean = f"{cell.mean:.{digits}f}"
    mean = rf"\mathbf{{{mean}}}" if cell.best else mean
    error = "" if cell.stderr is None else rf" \pm {cell.stderr:.{digits}f}"
    return f"${mean}{error}{'^*' if _mark(cell) else ''}$"


def notes(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """What the tables leave out and why, and what their marks mean."""
    lines = [
        f"Mean ± standard error (bootstrap over examples); bold: best; *: differs from "
        f"{plan.methods[0].label} (paired Wilcoxon signed-rank, p < 0.05 after Holm's correction).",
    ]
    left: dict[tuple[str, str, str], int] = {}
    failed: dict[tuple[str, str, str], set[str]] = {}
    references = {each.label: each.settings.get("reference", each.label) for each in plan.data}
    for row in rows:
        # Decodings of one data set fail alike.
        where = f"{row['model']}, {references[row['data']]}"
        for metric, reason in row["skipped"].items():
            left[where, metric, reason] = left.get((where, metric, reason), 0) + 1
        if row["error"]:
            failed.setdefault((where, row["example"], row["error"]), set()).add(row["method"])
    lines += [f"Left out on {d}, {m}, {n} times: {why}" for (d, m, why), n in left.items()]
    for (data, example, why), methods in failed.items():
        who = "every method" if len(methods) == len(plan.methods) else ", ".join(sorted(methods))
        lines.append(f"Left out on {data}, example {example}, {who}: {why}")
    return "\n".join(f"- {line}" for line in lines)


def write_tables(
    plan: Plan, rows: Sequence[dict[str, Any]], output: str | os.PathLike[str]
) -> list[Cell]:
    """`tables.md`, `tables.tex`, and `values.parquet` and `cells.parquet` where pandas is there.

    Figures are `write_plots`'. Raises `MissingPackageError` where scipy is not installed.
    """
    folder, cells, changes = Path(output), summarise(plan, rows), stability(plan, rows)
    below = notes(plan, rows) + _write_parquet(rows, cells, folder)
    parts, tex = [markdown(plan, cells)], latex(plan, cells)
    if changes:
        parts += [_CHANGES, markdown(plan, changes)]
        tex += f"\n% {_CHANGES}\n{latex(plan, changes)}"
    (folder / "tables.md").write_text("\n\n".join((*parts, below)) + "\n", encoding="utf-8")
    (folder / "tables.tex").write_text(tex, encoding="utf-8")
    return cells


_CHANGES = "Largest relative change over the decoding settings, against greedy decoding, %:"


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
