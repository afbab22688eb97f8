"""Write the tables of docs/performance.md and docs/evaluation.md from results/; see `make plots`.

What stands between `<!-- begin NAME -->` and `<!-- end -->` is made here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluations import RUNS
from variants_table import machine, table, tables

BENCH = Path(__file__).resolve().parent
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


def variants() -> list[str]:
    """Cost and fidelity of the presets."""
    report = read("cpu")
    return [*tables(report), "", f"{machine(report)}."]


def gpu() -> list[str]:
    """The operations on a GPU: the least and the most of each kernel's ratio and share."""
    rows = []
    kernels, attention = read("nvidia-h200/kernels"), read("nvidia-h200/attention")
    for one in kernels["rows"] + attention["rows"]:
        # `None` where the peer ran out of memory or is not supported.
        rows.append((one["operation"], one))
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        each = [one for kind, one in rows if kind == name]
        ratios = [one["ratio"] for one in each if one.get("ratio")]
        memory = [memory_ratio(one) for one in each if memory_ratio(one)]
        shares = [max(one[key] for key in SHARES if one.get(key)) for one in each if has_share(one)]
        lines.append(
            [
                f"`{name}`",
                ", ".join(sorted({str(one["length"]) for one in each}, key=int)),
                span(ratios, ".1f"),
                span(memory, ".1f"),
                span([100 * share for share in shares], ".0f"),
            ]
        )
    head = ["operation", "N", "times as fast as torch", "times less memory"]
    head += ["share of the nearer ceiling, %"]
    return [
        *table(head, lines),
        "",
        f"{kernels['gpu']}, torch {kernels['torch']}, triton {kernels['triton']}, bfloat16; over "
        "the shapes of GPT-J-6B, Phi-3-medium, Qwen2.5-3B and Llama-3.1-70B.",
    ]


SHARES = ("share_of_bytes", "share_of_flops")


def has_share(row: dict[str, Any]) -> bool:
    """Whether a row tells its share of a ceiling."""
    return any(row.get(key) for key in SHARES)


def memory_ratio(row: dict[str, Any]) -> float | None:
    """The peer's peak memory over ours."""
    if row.get("memory_ratio"):
        return float(row["memory_ratio"])
    if row.get("eager_peak_bytes") and row.get("peak_bytes"):
        return float(row["eager_peak_bytes"] / row["peak_bytes"])
    return None


def span(values: list[float], form: str) -> str:
    """The least and the most."""
    if not values:
        return ""
    ends = [format(end, form) for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def attributions() -> list[str]:
    """Whole attributions on a GPU."""
    found = read("nvidia-h200/engine")
    runs = {one["run"]: one for one in found["runs"]}
    rows = [
        [
            name,
            f"{one['seconds']:.1f}",
            f"{runs['authors'][counterpart(name)] / one['seconds']:.1f}",
            f"{one['peak_bytes'] / 1e9:.1f}",
        ]
        for name, one in runs.items()
    ]
    return table(["run", "seconds", "ratio to the authors'", "peak, GB"], rows)


def counterpart(run: str) -> str:
    """What of the authors' run another is compared with."""
    return "information" if run == "curvature none" else "seconds"


def paper_gpu() -> list[str]:
    """The paper's rows as measured on a GPU, where they were."""
    rows = [
        [
            one["model"] + ("" if one["blocks"][0] == one["blocks"][1] else " (extrapolated)"),
            f"{one['tokens']:,}",
            one["settings"]["variant"],
            f"{one['paper_seconds']:.3f}",
            f"{one['seconds']['total']:.1f}" + (", sampled" if one["sampled"] else ""),
            f"{100 * one['share_of_floor']:.0f}",
            one["gpu"],
        ]
        for path in sorted((BENCH / "results").glob("nvidia-*/paper.json"))
        for one in json.loads(path.read_text()).values()
    ]
    if not rows:
        return ["None of these rows has been measured on a GPU yet."]
    head = ["model", "N", "variant", "paper: s", "seconds, 1 probe", "share of the floor, %", "GPU"]
    return table(head, rows)


def evaluation(name: str) -> Callable[[], list[str]]:
    """The tables of a run of `heat-fast evaluate`."""

    def lines() -> list[str]:
        path = BENCH / "results" / f"evaluation-{name}" / "tables.md"
        return path.read_text().splitlines()

    return lines


PARTS: dict[str, Callable[[], list[str]]] = {
    "cpu": cpu,
    "variants": variants,
    "peers": peers,
    "scaling": scaling,
    "gpu": gpu,
    "attributions": attributions,
    "paper": paper,
    "paper_gpu": paper_gpu,
    **{name.replace("-", "_"): evaluation(name) for name in RUNS},
}


def page(text: str) -> str:
    """The page with its parts made anew."""
    return PART.sub(lambda at: at[1] + "\n".join(["", *PARTS[at[2]](), "", ""]) + at[3], text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
