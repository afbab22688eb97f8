"""Write the tables of docs/performance.md and docs/evaluation.md from results/; see `make plots`.

What stands between `<!-- begin NAME -->` and `<!-- end -->` is made here and nowhere else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from evaluations import RUNS
from variants_table import machine, table, tables

BENCH = Path(__file__).resolve().parent
sys.path.append(str(BENCH / "gpu"))

import tables as gpus  # noqa: E402

PAGES = [BENCH.parent / "docs" / f"{name}.md" for name in ("performance", "evaluation")]
PART = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((BENCH / "results" / f"{name}.json").read_text())


def peers() -> list[str]:
    """Other packages on the same prompt and model."""
    report = read("peers-cpu")
    lines = []
    for model in ("embedded", "stories3M"):
        each = [b for b in report["benchmarks"] if b["extra_info"]["model"] == model]
        rows = []
        for one in each:
            info = one["extra_info"]
            package = f" ({info['package']} {info['version']})" if info["package"] else ""
            rows.append(
                [
                    info["method"].removeprefix("heat_fast ") + package,
                    f"{one['stats']['median']:.3f}",
                    f"{info['ratio']:.2f}",
                    f"{info['beyond_model'] / 1e6:.0f}",
                    f"{info['scores']} scores: {info['returns']}",
                ]
            )
        name = {"embedded": "The embedded model", "stories3M": "The 3M-parameter story model"}
        lines += [f"{name[model]}, {each[0]['extra_info']['tokens']} tokens:", ""]
        lines += [*table(["", "seconds", "ratio", "MB", "returns"], rows), ""]
    return [
        *lines,
        f"{machine(report)}; medians of 3 runs (the authors': 1), ratios to the first row, peak "
        "memory of a separate call beyond what the process held.",
    ]


def scaling() -> list[str]:
    """Slopes of the scaling curves."""
    rows = []
    curves = read("scaling-cpu")["curves"]
    for name, curve in curves.items():
        slopes, points = curve["slopes"], curve["points"]
        settings = ", ".join(f"{key} {value}" for key, value in curve["settings"].items())
        tokens = "" if name == "tokens" else f"N {curve['tokens']}, "
        rows.append(
            [
                f"{name} {points[0]['value']} to {points[-1]['value']}",
                f"{curve['shape']}: {tokens}{settings}",
                *(f"{slopes[part]:.2f}" for part in ("seconds", "flops", "bytes")),
                *(
                    f"{slopes[part]:.2f}" if part in slopes else ""
                    for part in ("curvature", "information")
                ),
                f"{points[-1]['seconds']['total']:.1f}",
            ]
        )
    head = "varied,model and settings,seconds,FLOPs,bytes,S,I,seconds at the end".split(",")
    one = next(iter(curves.values()))
    return [
        *table(head, rows),
        "",
        f"{one['machine']}, {one['threads']} threads, torch {one['torch']}, {one['date']}.",
    ]


def paper() -> list[str]:
    """The paper's seconds and the floor."""
    rows = [
        [
            str(row["table"]),
            f"{row['model']}, {row['tokens']:,}",
            row["variant"],
            f"{row['paper_seconds']:.3f}",
            f"{row['information_seconds']:.1f}",
            f"{row['floor_seconds']:.1f}",
            f"{row['times_under_floor']:.0f}",
        ]
        for row in read("paper-floor")["rows"]
    ]
    head = ["table", "model, tokens", "variant", "paper: s per example"]
    head += ["floor of I alone, s", "floor, s", "floor / paper"]
    return table(head, rows)


def cpu() -> list[str]:
    """What the engine's and the low-rank step's benchmarks compare, on two machines."""
    reports = [read("cpu"), read("engine-cpu-avx512")]
    columns = [dict(report["heat_fast"]["comparisons"]) for report in reports]
    kinds = ("information", "full ", "block ", "coded", "basis", "low-rank")
    rows = [
        [name, *(column.get(name, "") for column in columns)]
        for name in dict.fromkeys(name for column in columns for name in column)
        if name.startswith(kinds) or "-token response" in name
        if "N=512" not in name and "FLOPs cheaper" not in name and "top-10" not in name
    ]
    names = [report["machine_info"]["cpu"]["brand_raw"].split("(R)")[0] for report in reports]
    return [*table(["", *names], rows), "", *(f"{machine(report)}." for report in reports)]


def products() -> list[str]:
    """Products with weights, and whole attributions, beside torch's products."""
    report = read("products-cpu")
    layers = [
        [
            " x ".join(f"{size:,}" for size in one["layer"]),
            *(f"{one[way]:.0f}, {one[way + '_torch']:.0f}" for way in ("forward", "adjoint")),
            f"{one['forward'] / one['forward_torch']:.1f}",
        ]
        for one in report["layers"]
    ]
    sizes = {"half": "Qwen2.5-0.5B's sizes", "llama": "the small Llama above"}
    runs = [
        [
            f"{sizes[one['shape']]}, {one['tokens']} tokens, {one['dtype']}",
            f"{one['seconds']:.1f}, {one['seconds_torch']:.1f}",
            f"{one['bytes'] / 1e6:.0f}, {one['bytes_torch'] / 1e6:.0f}",
        ]
        for one in report["attributions"]
    ]
    both = "here, torch's products"
    return [
        *table(["rows x in x out", f"GFLOP/s: {both}", "adjoint", "ratio"], layers),
        "",
        *table(["`gs`, random weights", f"seconds: {both}", "MB beyond the model"], runs),
        "",
        f"{report['machine']}, {report['threads']} threads (layers: 1), torch {report['torch']}, "
        f"{report['date']}.",
    ]


def variants() -> list[str]:
    """Cost and fidelity of the presets."""
    report = read("cpu")
    return [*tables(report), "", f"{machine(report)}."]


def gpu() -> list[str]:
    """The operations on a GPU: the least and the most of each kernel's ratios and shares."""
    lines: list[str] = []
    for folder in gpus.folders():
        measured = gpus.rows_of(folder, "kernels")
        rows = [
            [
                f"`{name}`" + ("" if dtype == "bfloat16" else f", {dtype}"),
                ", ".join(sorted({str(one["length"]) for one in each}, key=int)),
                span([one["ratio"] for one in each], ".1f"),
                span([one["eager_peak_bytes"] / one["peak_bytes"] for one in each], ".1f"),
                span([100 * nearer(one) for one in each], ".0f"),
            ]
            for (name, dtype), each in grouped(one for one in measured if "ratio" in one).items()
        ]
        head = ["operation", "N", "times as fast as torch", "times less memory"]
        head += ["share of the nearer ceiling, %"]
        lines += [*table(head, rows), "", f"{gpus.origin(measured)}.", ""]
    return [
        *lines,
        "Over the shapes of GPT-J-6B, Phi-3-medium, Qwen2.5-3B and Llama-3.1-70B, in bfloat16 "
        "where nothing else is said.",
    ]


def grouped(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by operation and dtype."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["operation"], row["dtype"]), []).append(row)
    return found


def nearer(row: dict[str, Any]) -> float:
    """The share of the ceiling that a kernel is nearer to."""
    return max(row.get("share_of_bytes") or 0.0, row.get("share_of_flops") or 0.0)


def span(values: list[float], form: str) -> str:
    """The least and the most."""
    ends = [format(end, form) for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def of_gpus(part: str) -> list[str]:
    """The table of a part, GPU by GPU."""
    lines: list[str] = []
    for folder in gpus.folders():
        rows = gpus.rows_of(folder, part)
        if rows:
            lines += [*gpus.PARTS[part][1](rows), "", f"{gpus.origin(rows)}.", ""]
    return lines[:-1] or ["None of these has been measured on a GPU yet."]


def evaluation(name: str) -> Callable[[], list[str]]:
    """The tables of a run of `heat-fast evaluate`."""

    def lines() -> list[str]:
        path = BENCH / "results" / f"evaluation-{name}" / "tables.md"
        return path.read_text().splitlines()

    return lines


PARTS: dict[str, Callable[[], list[str]]] = {
    "cpu": cpu,
    "products": products,
    "variants": variants,
    "peers": peers,
    "scaling": scaling,
    "gpu": gpu,
    "low_rank": partial(of_gpus, "low_rank"),
    "attributions": partial(of_gpus, "attribution"),
    "paper": paper,
    "paper_gpu": partial(of_gpus, "paper"),
    **{name.replace("-", "_"): evaluation(name) for name in RUNS},
}


def page(text: str) -> str:
    """The page with its parts made anew."""
    return PART.sub(lambda at: at[1] + "\n".join(["", *PARTS[at[2]](), "", ""]) + at[3], text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
