"""The tables of `test_bench_variants.py` as Markdown, from its JSON: `variants_table.py NAME`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cost_row(info: dict[str, Any]) -> list[str]:
    """A preset at a length."""
    counts = info["counts"]
    return [
        info["variant"],
        str(info["tokens"]),
        f"{info['seconds']['total']:.2f}",
        f"{info['beyond_model'] / 1e6:.0f}",
        str(counts["hvp"]),
        str(counts["branch_tokens"]),
        f"{info['total_flops'] / 1e9:.0f}",
        f"{info['cheaper_flops']:.1f}",
        f"{info['faster']:.1f}",
        f"{info['memory']:.2f}",
    ]


def fidelity_row(info: dict[str, Any]) -> list[str]:
    """A preset's nearness to `full`."""
    cells = [
        f"{rank:.3f}, {top:.1f}, {error:.2f}" for rank, top, error in info["fidelity"].values()
    ]
    return [info["variant"], str(info["counts"]["hvp"]), *cells]


def machine(report: dict[str, Any]) -> str:
    """Where and with what a report was measured."""
    where, versions = report["machine_info"], report["heat_fast"]
    name = where["cpu"].get("brand_raw", where["processor"])
    return (
        f"{name}, {versions['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, Python {versions['python']}, "
        f"{report['datetime'][:10]}"
    )


def tables(report: dict[str, Any]) -> list[str]:
    """Cost and fidelity of the presets."""
    infos = [each["extra_info"] for each in report["benchmarks"]]
    cost_head = "preset,N,seconds,MB beyond the model,HVPs,branch tokens,GFLOP".split(",")
    cost_head += ["FLOPs: times cheaper", "times faster", "memory, of full"]
    parts = ["gate", "S", "I", "score"]
    lines = [
        "Cost on a random-weight Llama of 2 blocks, width 96 and three heads, 2 probes; ratios to "
        "`full`:",
        "",
        *table(cost_head, [cost_row(info) for info in infos if "cheaper_flops" in info]),
    ]
    lines += [
        f"\nWith 16 blocks of width 256 `lr+win` takes {info['memory']:.2f} times the memory of "
        f"`full` at 2,048 tokens ({info['deep']['lr+win']['beyond_model'] / 1e6:.0f} and "
        f"{info['deep']['full']['beyond_model'] / 1e6:.0f} MB beyond the model)."
        for info in infos
        if "deep" in info
    ]
    close = [fidelity_row(info) for info in infos if "fidelity" in info]
    if close:
        lines += [
            "",
            "Fidelity on a 3M-parameter story model, 256 tokens, windows of 128, against `full` "
            "with 32 block probes of another seed: Spearman, top-10 overlap, relative l1 error.",
            "",
            *table(["preset", "HVPs", *parts], close),
        ]
    return lines


def main() -> None:
    name = sys.argv[1]
    report = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [f"{machine(report)}; by `test_bench_variants.py`.", "", *tables(report)]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
