"""Write what each GPU's benchmarks left as tables: `bench/results/<gpu>/tables.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(BENCH))

from variants_table import table  # noqa: E402

Row = dict[str, Any]


def folders() -> list[Path]:
    """One for each GPU that was measured."""
    return sorted(path for path in (BENCH / "results").glob("nvidia-*") if path.is_dir())


def rows_of(folder: Path, part: str) -> list[Row]:
    """What a part of the benchmarks left on a GPU."""
    path = folder / f"{part}.json"
    return list(json.loads(path.read_text()).values()) if path.is_file() else []


def number(row: Row, key: str, form: str, times: float = 1) -> str:
    """A figure of a row, empty where it has none."""
    return format(times * row[key], form) if row.get(key) is not None else ""


def origin(rows: Iterable[Row]) -> str:
    """What the rows were measured with, and when."""
    kinds = dict.fromkeys(
        (row["gpu"], row["torch"], row.get("triton"), row["date"], row.get("includes_launches"))
        for row in rows
    )
    return "; ".join(
        f"{gpu}, torch {torch}"
        + (f", triton {triton}" if triton else "")
        + f", {date}"
        + (" (with the host's time to launch a call)" if launches else "")
        for gpu, torch, triton, date, launches in kinds
    )


COMPILED = ", torch.compile"


def place(row: Row) -> tuple[str, str, int]:
    """What a row of the kernels is of."""
    return row["operation"].removesuffix(COMPILED), row["model"], row["length"]


def kernels(rows: list[Row]) -> list[str]:
    """Operations beside eager torch."""
    compiled = {place(row): row["seconds"] for row in rows if row["operation"].endswith(COMPILED)}
    lines = [
        [
            f"`{row['operation']}`",
            row["model"],
            f"{row['length']:,}",
            row["dtype"],
            number(row, "seconds", ".3f", 1e3),
            row.get("eager") or number(row, "eager_seconds", ".3f", 1e3),
            number({"seconds": compiled.get(place(row))}, "seconds", ".3f", 1e3),
            number(row, "ratio", ".1f"),
            number(row, "share_of_bytes", ".0f", 100),
            number(row, "share_of_flops", ".0f", 100),
            number(row, "peak_bytes", ".1f", 1e-6),
            number(row, "eager_peak_bytes", ".1f", 1e-6),
            number(row, "error", ".1e"),
        ]
        for row in rows
        if not row["operation"].endswith(COMPILED)
    ]
    head = ["operation", "model", "N", "dtype", "ms", "eager ms", "compiled ms", "ratio", "% bytes"]
    return table([*head, "% FLOPs", "MB", "eager MB", "error"], lines)


def low_rank(rows: list[Row]) -> list[str]:
    """Ways to a basis or to factors, and the kernels of the extension."""
    ways = [
        [
            row["matrix"],
            row["way"],
            number(row, "seconds", ".2f", 1e3),
            number(row, "orthogonality", ".1e"),
            number(row, "residual", ".1e"),
        ]
        for row in rows
        if "way" in row
    ]
    primitives = [
        [
            row["primitive"],
            number(row, "seconds", ".3f", 1e3),
            number(row, "share_of_float64", ".0f", 100),
            number(row, "share_of_bytes", ".0f", 100),
        ]
        for row in rows
        if "primitive" in row
    ]
    return [
        *table(["matrix", "way", "ms", "max abs(Q'Q - I)", "residual"], ways),
        "",
        *table(["kernel", "ms", "% of float64 products", "% of a copy"], primitives),
    ]


def attribution(rows: list[Row]) -> list[str]:
    """Whole attributions, and the authors' algorithm: all of it, or information alone."""
    theirs = {(row["part"], row["dtype"], row["tokens"]): row for row in rows if "part" in row}
    lines = []
    for row in rows:
        if "run" not in row:
            continue
        wanted = ["information"] if row["run"] == "no curvature" else ["information", "curvature"]
        parts = [theirs.get((part, row["dtype"], row["tokens"])) for part in wanted]
        known = [part["seconds"] for part in parts if part]
        whole = sum(known) if len(known) == len(parts) else None
        lines.append(
            [
                row["run"],
                row["dtype"],
                f"{row['tokens']:,}",
                number(row, "seconds", ".2f"),
                number({"whole": whole}, "whole", ".1f"),
                number({"ratio": whole and whole / row["seconds"]}, "ratio", ".1f"),
                number(row, "share_of_floor", ".0f", 100),
                number(row, "peak_bytes", ".1f", 1e-9),
            ]
        )
    head = ["run", "dtype", "N", "seconds", "the authors' seconds", "ratio"]
    return table([*head, "share of the floor, %", "peak, GB"], lines)


def paper(rows: list[Row]) -> list[str]:
    """The paper's rows."""
    lines = [
        [
            row["model"] + ("" if row["blocks"][0] == row["blocks"][1] else " (extrapolated)"),
            f"{row['tokens']:,}",
            row["settings"]["variant"],
            f"{row['paper_seconds']:.3f}",
            f"{row['seconds']['total']:.1f}" + (", sampled" if row["sampled"] else ""),
            number(row, "share_of_floor", ".0f", 100),
            number(row, "a100_seconds", ".1f"),
            number(row, "peak_bytes", ".1f", 1e-9),
        ]
        for row in rows
    ]
    head = ["model", "N", "variant", "paper: s", "seconds, 1 probe", "share of the floor, %"]
    return table([*head, "A100's floor (projection), s", "peak, GB"], lines)


def tiles(rows: list[Row]) -> list[str]:
    """Shipped tiles beside the fastest that were found."""

    def sizes(tile: dict[str, int]) -> str:
        return ", ".join(f"{name} {size}" for name, size in tile.items())

    lines = [
        [
            f"`{row['operation']}`, `{row['table']}`",
            row["model"],
            f"{row['length']:,}",
            row["dtype"],
            sizes(row["shipped"]),
            number(row, "shipped_seconds", ".3f", 1e3),
            sizes(row["best"]) if row["best"] != row["shipped"] else "the same",
            number(row, "ratio", ".2f"),
            str(len(row["tried"])),
        ]
        for row in rows
    ]
    head = ["operation, table", "model", "N", "dtype", "shipped", "ms", "fastest"]
    return table([*head, "times as fast", "tried"], lines)


PARTS: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "kernels": ("Kernels against unfused torch", kernels),
    "low_rank": ("The low-rank step, 500,000 x 128", low_rank),
    "attribution": (
        "Whole attributions, a random-weight Llama of 1.2 billion parameters",
        attribution,
    ),
    "paper": ("The paper's rows, one example", paper),
    "tiles": ("Tiles", tiles),
}


def page(folder: Path) -> str:
    """All tables of a GPU."""
    lines = [
        f"# {folder.name}",
        "",
        "Made by `make plots` from the JSON beside this page; `bench/gpu/test_bench_*.py` tell "
        "what is measured, and how.",
    ]
    for part, (title, make) in PARTS.items():
        rows = rows_of(folder, part)
        if rows:
            lines += ["", f"## {title}", "", *make(rows), "", f"{origin(rows)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for each in folders():
        (each / "tables.md").write_text(page(each))
