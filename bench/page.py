"""Write the tables of docs/performance.md and docs/evaluation.md from results/; see `make plots`.

What stands between `<!-- begin NAME -->` and `<!-- end -->` is made here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from variants_table import table

BENCH = Path(__file__).resolve().parent
PAGES = [BENCH.parent / "docs" / f"{name}.md" for name in ("performance", "evaluation")]
PART = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((BENCH / "results" / f"{name}.json").read_text())


def peers() -> list[str]:
    """Other packages on the same prompt and model."""
    report = read("peers-cpu")
    machine, versions = report["machine_info"], report["heat_fast"]
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
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    return [
        *lines,
        f"{cpu}, {versions['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {versions['python']}, {report['datetime'][:10]}; "
        "medians of 3 runs (the authors': 1), ratios to the first row, peak memory of a separate "
        "call beyond what the process held.",
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


def quick() -> list[str]:
    """The tables of the evaluation's preset of that name."""
    return (BENCH / "results" / "evaluation-quick" / "tables.md").read_text().splitlines()


PARTS: dict[str, Callable[[], list[str]]] = {
    "peers": peers,
    "scaling": scaling,
    "paper": paper,
    "quick": quick,
}


def page(text: str) -> str:
    """The page with its parts made anew."""
    return PART.sub(lambda at: at[1] + "\n".join(["", *PARTS[at[2]](), "", ""]) + at[3], text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
