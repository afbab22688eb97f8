"""Draw `results/scaling-cpu.json` into docs/images/: `make plots`. Nothing is measured here.

Figures of evaluations, which `heat-fast evaluate` draws, are copied beside them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

BENCH = Path(__file__).resolve().parent
IMAGES = BENCH.parent / "docs" / "images"
LABELS = {
    "tokens": "prompt tokens",
    "targets": "target tokens",
    "codes": "codes (2 products each)",
    "probes": "block probes",
    "rank": "rank",
    "window": "window, tokens",
    "layers": "blocks swept",
}


def draw(curves: dict[str, Any], what: str, name: str) -> None:
    """One panel per curve, both axes logarithmic, with the fitted slope."""
    figure, axes = pyplot.subplots(2, 4, figsize=(12, 5.6), layout="constrained")
    panels = iter(axes.flat)
    for key, curve in curves.items():
        panel, points = next(panels), curve["points"]
        x = [point["value"] for point in points]
        if what == "seconds":
            for part in ("total", "curvature", "information", "gate"):
                y = [point["seconds"].get(part, 0) for point in points]
                if all(y):
                    panel.plot(x, y, marker="o", markersize=3, label=part)
        else:
            panel.plot(x, [point["bytes"] / 1e6 for point in points], marker="o", markersize=3)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[key])
        panel.set_xticks(x, [str(value) for value in x], fontsize=7)
        panel.minorticks_off()
        panel.set_title(f"slope {curve['slopes'][what]:.2f}", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels:
        panel.axis("off")
    if what == "seconds":
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", fontsize=9)
    figure.supylabel("seconds" if what == "seconds" else "MB beyond the model", fontsize=10)
    for ending in ("png", "svg"):
        # Without a date the same numbers make the same file.
        metadata = {"Date": None} if ending == "svg" else {"Software": None}
        figure.savefig(IMAGES / f"{name}.{ending}", dpi=130, metadata=metadata)
    pyplot.close(figure)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "heat-fast"
    curves = json.loads((BENCH / "results" / "scaling-cpu.json").read_text())["curves"]
    IMAGES.mkdir(exist_ok=True)
    draw(curves, "seconds", "scaling-time")
    draw(curves, "bytes", "scaling-memory")
    for name in ("baselines", "components", "interventions"):
        [path] = (BENCH / "results" / f"evaluation-{name}").glob("*.png")
        shutil.copyfile(path, IMAGES / f"evaluation-{name}.png")


if __name__ == "__main__":
    main()
