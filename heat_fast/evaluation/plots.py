"""The tables of an evaluation as figures: a panel for each metric, a row for each method."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heat_fast.evaluation.cells import Cell, columns, grouped
from heat_fast.evaluation.measures import MEASURES
from heat_fast.evaluation.plan import Plan

_PANELS = 4  # in a row
_BEST, _OTHER = "#b5400e", "#39506b"


def write_plots(plan: Plan, cells: Sequence[Cell], output: str | os.PathLike[str]) -> list[Path]:
    """One figure per model and data set, as PNG and SVG: `<model>-<data>.png` in the folder.

    A dot is a mean, its bar the standard error on both sides; the best of a metric is in red, and a
    hollow dot does not differ from the first method (p >= 0.05 after correction). The arrow by a
    metric's name points to the better side. Returns the files; none without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return []
    found = []
    for (model, data), some in grouped(cells).items():
        with rc_context({"svg.hashsalt": "heat-fast"}):
            figure = _draw(plan, some, f"{model}, {data}", Figure)
            for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                name = re.sub(r"[^\w.-]+", "-", f"{model}-{data}").strip("-")
                found.append(Path(output) / f"{name}.{ending}")
                figure.savefig(found[-1], dpi=130, metadata=metadata)
    return found


def _draw(plan: Plan, cells: Sequence[Cell], title: str, make: Any) -> Any:
    by_place = {(cell.method, cell.metric): cell for cell in cells}
    shown = [name for name in columns(plan) if any(name == metric for _, metric in by_place)]
    methods = [each.label for each in plan.methods]
    lower = {each.label for each in plan.metrics if MEASURES[each.name].better == "lower"}
    rows = -(-len(shown) // _PANELS)
    width = min(len(shown), _PANELS)
    figure = make(
        figsize=(2.4 + 2.3 * width, rows * (1.0 + 0.24 * len(methods))), layout="constrained"
    )
    panels = figure.subplots(rows, width, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, shown, strict=False):
        for place, method in enumerate(methods):
            cell = by_place.get((method, name))
            if cell is None:
                continue
            color = _BEST if cell.best else _OTHER
            apart = method == methods[0] or (cell.p is not None and cell.p < 0.05)
            panel.errorbar(
                cell.mean,
                place,
                xerr=cell.stderr,
                fmt="o",
                markersize=5,
                color=color,
                markerfacecolor=color if apart else "white",
                elinewidth=1,
            )
        panel.set_title(f"{name} {'←' if name in lower else '→'}", fontsize=9)
        panel.set_yticks(range(len(methods)), methods, fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0, 0].invert_yaxis()
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure
