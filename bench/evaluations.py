"""Run the presets of `heat-fast evaluate` into results/evaluation-*: `make evaluations`.

Runs that were stopped go on. Those on a story model and on public data need HEAT_FAST_MODELS and
HEAT_FAST_DATA, the folders that hold them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> None:
    for name, arguments in RUNS.items():
        needed = {part.split("/")[0] for each in arguments for part in each.split("$")[1:]}
        missing = sorted(variable for variable in needed if variable not in os.environ)
        if missing:
            print(f"{name}: left out, {', '.join(missing)} is not set", flush=True)
            continue
        begun = time.monotonic()
        command = [sys.executable, "-W", "ignore", "-m", "heat_fast", "evaluate", *arguments]
        folder = RESULTS / f"evaluation-{name}"
        subprocess.run(
            [*command, "--output", str(folder), "--quiet"], check=True, stdout=subprocess.DEVNULL
        )
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
