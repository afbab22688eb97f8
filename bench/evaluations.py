"""Run the presets of `heat-fast evaluate` into results/evaluation-*: `make evaluations`.

Runs that were stopped go on. Those on a story model and on public data need HEAT_FAST_MODELS and
HEAT_FAST_DATA, the folders that hold them.

`python bench/evaluations.py --again faml` measures one method anew, in the runs that have it, and
keeps what the others got.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
STORIES = ["--model", "$HEAT_FAST_MODELS/stories3M"]
AUTHORS = [*STORIES, "--data", "authors=$HEAT_FAST_DATA/heta_authors/dev.jsonl"]
#: Folder and arguments of every run.
RUNS: dict[str, list[str]] = {
    "quick": ["quick"],
    "baselines": ["baselines"],
    "components": ["components"],
    "weights": ["weights"],
    "interventions": ["interventions"],
    "decoding": ["decoding"],
    "windows": ["windows"],
    "spans": ["spans"],
    "baselines-stories3M": ["baselines", *AUTHORS],
    "components-stories3M": ["components", *AUTHORS, "--limit", "15"],
    "decoding-stories3M": ["decoding", *AUTHORS, "--limit", "15"],
    "spans-stories3M": [
        *("spans", *STORIES, "--data", "sciq=$HEAT_FAST_DATA/sciq/dev.jsonl", "--limit", "20"),
    ],
}


def forget(folder: Path, methods: Collection[str]) -> bool:
    """Take the rows of some methods out of a run, so that it measures them anew.

    Without `rows.jsonl`, which is not committed, rows are those of `values.parquet`. It does not
    tell why a metric was left out: rows that lack one are measured anew as well.

    Returns whether the plan of the run has one of the methods; where it has none nothing changes.
    """
    plan = json.loads((folder / "plan.json").read_text())["plan"]
    if not {each["label"] for each in plan["methods"]} & set(methods):
        return False
    path = folder / "rows.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = _whole(folder / "values.parquet", len(plan["metrics"]))
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(r) + "\n" for r in rows if r["method"] not in methods))
    fresh.replace(path)
    return True


def _whole(path: Path, metrics: int) -> list[dict[str, Any]]:
    import pandas

    names = ["model", "data", "method", "example"]
    rest = {"targets": [], "skipped": {}, "seconds": None, "error": None}
    return [
        {
            **dict(zip(names, key, strict=True)),
            "values": dict(zip(each["metric"], each["value"], strict=True)),
            **rest,
        }
        for key, each in pandas.read_parquet(path).groupby(names, sort=False)
        if len(each) == metrics
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the presets of heat-fast evaluate.")
    parser.add_argument("--again", nargs="+", metavar="METHOD", help="measure only these anew")
    again = parser.parse_args().again
    for name, arguments in RUNS.items():
        needed = {part.split("/")[0] for each in arguments for part in each.split("$")[1:]}
        missing = sorted(variable for variable in needed if variable not in os.environ)
        if missing:
            print(f"{name}: left out, {', '.join(missing)} is not set", flush=True)
            continue
        folder = RESULTS / f"evaluation-{name}"
        if again and not forget(folder, again):
            continue
        begun = time.monotonic()
        command = [sys.executable, "-W", "ignore", "-m", "heat_fast", "evaluate", *arguments]
        subprocess.run(
            [*command, "--output", str(folder), "--quiet"], check=True, stdout=subprocess.DEVNULL
        )
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
