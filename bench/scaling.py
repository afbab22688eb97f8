"""How time and memory grow with N, targets, products, rank, window and layers.

    python bench/scaling.py [NAME ...] [--write scaling-cpu]

Every point is one attribution of a random-weight Llama in a process of its own (`peak_memory.py`),
so that its peak is its own. Printed for every curve: the slopes of log(seconds), log(FLOPs) and
log(bytes) over the upper half of log(x), where constant costs weigh least. With `--write` the
points go to `results/NAME.json`; curves that are measured again replace those that the file holds.
`make plots` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy
import torch
from sizes import SMALL

HERE = Path(__file__).resolve().parent
CODED = {"estimator": "coded", "codes": 8, "probes": 2}


@dataclass(frozen=True)
class Curve:
    """What varies, over which values; the model's shape, the prompt's length, other settings."""

    values: tuple[int, ...]
    shape: str = "small"
    tokens: int = 256
    settings: dict[str, Any] = field(default_factory=dict)


CURVES = {
    "tokens": Curve((128, 256, 512, 1024, 2048, 4096), "narrow", settings=CODED),
    "targets": Curve((1, 2, 4, 8, 16, 32, 64, 128), tokens=128, settings=CODED),
    "codes": Curve((4, 8, 16, 32, 64), settings={"estimator": "coded", "probes": 2}),
    "probes": Curve((1, 2, 4, 8), tokens=128, settings={"estimator": "block"}),
    "rank": Curve((8, 16, 32, 64, 128), settings={"variant": "lr"}),
    "window": Curve(
        (96, 128, 192, 256, 384, 512), tokens=1024, settings={"variant": "win", **CODED}
    ),
    "layers": Curve((1, 2, 4, 8, 16), "deep", tokens=128, settings={"variant": "ls", **CODED}),
}


def point(name: str, curve: Curve, value: int) -> dict[str, Any]:
    """One attribution: seconds and FLOPs of every component, bytes beyond the model."""
    settings, tokens, targets = dict(curve.settings), curve.tokens, 1
    if name == "tokens":
        tokens = value
    elif name == "targets":
        targets = value
    else:
        settings[name] = value
    command = [sys.executable, str(HERE / "peak_memory.py"), str(tokens), json.dumps(settings)]
    command += [curve.shape, str(targets)]
    outcome = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(outcome.stdout)
    return {
        "value": value,
        "seconds": told["seconds"],
        "flops": {**told["flops"], "total": sum(told["flops"].values())},
        "bytes": told["peak"] - told["model"],
    }


def slope(x: list[float], y: list[float]) -> float:
    """Exponent of y ~ x^a over the upper half of log(x), at least three points."""
    half = max(3, (len(x) + 1) // 2)
    return float(numpy.polyfit(numpy.log(x[-half:]), numpy.log(y[-half:]), 1)[0])


def slopes(points: list[dict[str, Any]]) -> dict[str, float]:
    """The exponents of a curve."""
    x = [each["value"] for each in points]
    found = {
        "seconds": slope(x, [each["seconds"]["total"] for each in points]),
        "flops": slope(x, [each["flops"]["total"] for each in points]),
        "bytes": slope(x, [each["bytes"] for each in points]),
    }
    for part in ("gate", "curvature", "information"):
        took = [each["seconds"].get(part, 0) for each in points]
        if all(took):
            found[part] = slope(x, took)
    return found


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", nargs="*", metavar="NAME", help=", ".join(CURVES))
    parser.add_argument("--write", metavar="NAME", help="keep results/NAME.json")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.curves} - {*CURVES}):
        parser.error(f"no curve is called {', '.join(unknown)}: expected one of {list(CURVES)}")
    path = HERE / "results" / f"{arguments.write}.json" if arguments.write else None
    report = json.loads(path.read_text()) if path and path.exists() else {"curves": {}}
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    for name in arguments.curves or CURVES:
        curve = CURVES[name]
        values = curve.values[:3] if SMALL else curve.values
        points = []
        for value in values:
            points.append(point(name, curve, value))
            last = points[-1]
            print(
                f"{name} {value}: {last['seconds']['total']:.3f} s, "
                f"{last['flops']['total'] / 1e9:.2f} GFLOP, {last['bytes'] / 1e6:.0f} MB",
                flush=True,
            )
        found = slopes(points)
        print(f"{name}: slopes " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
        report["curves"][name] = {
            "shape": curve.shape,
            "tokens": curve.tokens,
            "settings": curve.settings,
            "points": points,
            "slopes": found,
            "machine": processor(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "revision": revision,
            "date": date.today().isoformat(),
        }
        if path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
