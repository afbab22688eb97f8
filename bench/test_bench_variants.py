"""Every preset's time, memory and counts at growing lengths, and its fidelity to `full`.

Costs are those of a random-weight Llama small enough for `full` with the block estimator at 2,048
tokens (2 blocks, width 96, three heads), each run in a process of its own; `ls` keeps one of its
two blocks. All presets use 2 probes, so that what differs is the preset. Two blocks keep so little
that the sketch of `lr` outweighs it; what a model of usual depth takes is measured with 16 blocks
of width 256, by runs that hold as much as whole ones and stop early. Fidelity is measured on the
3M-parameter story model, where that is on disk, against `full` with
32 block probes (16 unless HEAT_FAST_BENCH=full).

    HEAT_FAST_BENCH=full make bench JSON=variants-cpu PYTEST_ARGS="-k variants"
    .venv/bin/python bench/variants_table.py variants-cpu      # writes the Markdown beside it
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from measures import overlap, relative_error
from models import story_ids
from sizes import FULL, SMALL, size

from heat_fast import Attribution, Attributor, HeatConfig
from heat_fast.config import PRESETS
from heat_fast.ranks import spearman

if TYPE_CHECKING:
    from conftest import Summary

HERE = Path(__file__).resolve().parent
LENGTHS = (32,) if SMALL else (512, 1024, 2048) if FULL else (512, 1024)
PROBES = 2
STORY = size(256)
LONG_STORY = size(500)
REFERENCE_PROBES = 32 if FULL else size(16)
FIDELITY: dict[str, dict[str, Any]] = {
    "full, 2 probes": {"variant": "full", "probes": 2},
    "full, coded": {"variant": "full", "estimator": "coded", "codes": 16, "probes": 4},
    "lr": {"variant": "lr"},
    "lr, rank 256": {"variant": "lr", "rank": 256},
    "ls": {"variant": "ls", "layers": 3, "probes": 2},
    "win": {"variant": "win", "window": 128, "probes": 2},
    "win, uniform": {
        "variant": "win",
        "window": 128,
        "window_weights": "uniform",
        "probes": 2,
    },
    "lr+win": {"variant": "lr+win", "window": 128},
    "ls+win": {"variant": "ls+win", "layers": 3, "window": 128, "probes": 2},
    "gs": {"variant": "gs"},
}


def peak(length: int, settings: dict[str, Any], shape: str) -> dict[str, Any]:
    """What `peak_memory.py` tells of one attribution, with totals."""
    command = [sys.executable, str(HERE / "peak_memory.py"), str(length)]
    command += [json.dumps(settings), shape]
    outcome = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = json.loads(outcome.stdout)
    told["total_flops"] = sum(told["flops"].values())
    told["beyond_model"] = told["peak"] - told["model"]
    return told


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", PRESETS)
def test_cost(
    benchmark: Any, variant: str, length: int, summary: Summary, costs: dict[Any, Any]
) -> None:
    """One attribution; `full` comes first, and the others are told as ratios to it."""
    settings: dict[str, Any] = {"variant": variant, "probes": PROBES}
    if "ls" in variant:
        settings["layers"] = 1
    told = benchmark.pedantic(peak, (length, settings, "small"), rounds=1)
    costs[variant, length] = told
    full = costs.get(("full", length))
    if full is None:
        pytest.fail(f"full did not run at {length} tokens: there is nothing to compare with")
    ratios = {
        "cheaper_flops": full["total_flops"] / told["total_flops"],
        "faster": full["seconds"]["total"] / told["seconds"]["total"],
        "memory": told["beyond_model"] / full["beyond_model"],
    }
    benchmark.extra_info.update(variant=variant, tokens=length, **told, **ratios)
    summary.add(
        f"{variant}, N={length}: FLOPs cheaper, faster, memory, of full",
        f"{ratios['cheaper_flops']:.1f}, {ratios['faster']:.1f}, {ratios['memory']:.2f}",
    )


# Two of all products, two tokens of the information, and one of the equal windows: memory is the
# same in the next ones.
SAMPLED = {"probes": 1, "coverage": 0.01}
DEEP: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (size(2048), {"variant": "full", "estimator": "coded", "codes": 2, **SAMPLED}),
    "lr+win": (size(512), {"variant": "lr+win", **SAMPLED}),
}


@pytest.mark.skipif(not (FULL or SMALL), reason="takes minutes: HEAT_FAST_BENCH=full")
def test_memory_of_a_deep_model(benchmark: Any, summary: Summary) -> None:
    """Peak memory at 2,048 tokens of `full` and of `lr+win`."""
    told = {}

    def run() -> None:
        for variant, (length, settings) in DEEP.items():
            told[variant] = peak(length, settings, "deep")

    benchmark.pedantic(run, rounds=1)
    memory = told["lr+win"]["beyond_model"] / told["full"]["beyond_model"]
    benchmark.extra_info.update(deep=told, memory=memory)
    summary.add("lr+win, N=2048, 16 blocks of width 256: memory, of full", f"{memory:.2f}")


@pytest.fixture(scope="session")
def costs() -> dict[Any, Any]:
    """What was told of each preset and length in this run."""
    return {}


@pytest.fixture(scope="session")
def exact(stories: tuple[Any, Any]) -> tuple[Any, list[int], Attribution]:
    """A story of 256 tokens: model, ids, and `full` with many block probes of another seed."""
    model, tokenizer = stories
    ids = story_ids(model, tokenizer, STORY)
    config = HeatConfig(probes=REFERENCE_PROBES, seed=1)
    return model, ids, Attributor(model, None, config).attribute(ids)


@pytest.mark.parametrize("settings", FIDELITY.values(), ids=FIDELITY)
def test_fidelity(
    benchmark: Any,
    exact: tuple[Any, list[int], Attribution],
    settings: dict[str, Any],
    request: pytest.FixtureRequest,
    summary: Summary,
) -> None:
    """Gate, S, I and score against `full`: Spearman, top-10 overlap, relative l1 error."""
    model, ids, wanted = exact
    config = HeatConfig.preset(**{"name": "full", **_renamed(settings)})
    found = benchmark.pedantic(
        lambda: Attributor(model, None, config).attribute(ids, list(wanted.target_ids)), rounds=1
    )
    pairs = {
        "gate": (found.gate[0], wanted.gate[0]),
        "curvature": (found.curvature[0], wanted.curvature[0]),
        "information": (found.information[0], wanted.information[0]),
        "score": (found.scores, wanted.scores),
    }
    measured = {
        name: [spearman(*pair), overlap(*pair), relative_error(*pair)]
        for name, pair in pairs.items()
    }
    label = request.node.callspec.id
    benchmark.extra_info.update(
        variant=label, fidelity=measured, counts=dict(found.metadata["counts"])
    )
    summary.add(
        f"{label}, stories3M, N={STORY}: Spearman of S, of the score; top-10 of the score",
        f"{measured['curvature'][0]:.3f}, {measured['score'][0]:.3f}; {measured['score'][1]:.1f}",
    )


def test_window_tolerance(benchmark: Any, stories: tuple[Any, Any], summary: Summary) -> None:
    """A story of 500 tokens in windows of 128: those of little weight left out, against all."""
    model, tokenizer = stories
    ids = story_ids(model, tokenizer, LONG_STORY)
    settings: dict[str, Any] = {"window": 128, "estimator": "coded", "probes": 2}
    whole = HeatConfig.preset("win", **settings)
    some = whole.replace(window_tolerance=0.01)
    found = benchmark.pedantic(lambda: Attributor(model, None, some).attribute(ids), rounds=3)
    begin = time.perf_counter()
    wanted = Attributor(model, None, whole).attribute(ids, list(found.target_ids))
    ratio = (time.perf_counter() - begin) / benchmark.stats.stats.median
    windows: Any = found.metadata["windows"]
    left, count = len(windows["not_swept"]), len(windows["stretches"])
    kept = float(found.scores.sum() / wanted.scores.sum())
    top = overlap(found.scores, wanted.scores)
    benchmark.extra_info.update(ratio=ratio, left_out=left, windows=count, kept=kept, top=top)
    what = f"coded, windows of {whole.window}, tolerance 0.01, stories3M, N={len(ids)}"
    summary.add(f"{what}: windows left out", f"{left} of {count}")
    summary.add(f"{what}: ratio to all windows", f"{ratio:.1f}")
    summary.add(f"{what}: share of the score kept; top 10 in common", f"{kept:.1%}; {top:.1f}")


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {("name" if key == "variant" else key): value for key, value in settings.items()}
