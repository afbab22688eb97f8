"""Benchmarks on a GPU: device clock, flushed cache, results row by row.

Every benchmark that has run leaves a row in `bench/results/<gpu>/<file>.json`, where `<file>` is
its test file without `test_bench_`. A row that is there is not measured again: a campaign that was
cut off goes on where it stopped. Delete the file, or a row, to measure anew; rows without a `clock`
are of earlier benchmarks, and are measured anew anyway. After
`HEAT_FAST_BENCH_SECONDS` (540 if not set) the rest is left for another run.
`HEAT_FAST_BENCH_RESULTS` names another folder than `bench/results`. `tables.py` makes a page of a
GPU's rows.

Without a CUDA device they are skipped, or with `HEAT_FAST_BENCH=small` run on tiny shapes, kernels
in Triton's interpreter, so that none can rot; then nothing is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import COMMITTED, clock, flush, folder, hold, lead, with_peak
from sizes import SMALL

from heat_fast.ceilings import Ceilings, measure

# Read when Triton is first imported.
if SMALL and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LIMIT = float(os.environ.get("HEAT_FAST_BENCH_SECONDS", "540"))
_BEGAN = time.monotonic()


def rows_of(item: pytest.Item) -> Path | None:
    """The file of a benchmark's row; None without a device, and of tiny shapes."""
    if SMALL or not torch.cuda.is_available():
        return None
    return folder() / f"{item.path.stem.removeprefix('test_bench_')}.json"


def read_rows(path: Path) -> dict[str, Any]:
    """The rows that are there, by test."""
    return json.loads(path.read_text()) if path.is_file() else {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    path = rows_of(item)
    if path is None:
        if not SMALL:
            pytest.skip("no CUDA device")
        return
    if "clock" in read_rows(path).get(item.name, {}):
        pytest.skip(f"measured before: its row is in {path}")
    if time.monotonic() - _BEGAN > LIMIT:
        pytest.skip(f"left for another run: {LIMIT:.0f} s are over (HEAT_FAST_BENCH_SECONDS)")


@pytest.fixture
def device() -> torch.device:
    """Where the models are made."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings() -> Callable[[torch.dtype], Ceilings]:
    """The device's ceilings in a dtype, measured once in this process."""
    found: dict[torch.dtype, Ceilings] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def of(dtype: torch.dtype) -> Ceilings:
        if dtype not in found:
            found[dtype] = measure(device, dtype)
        return found[dtype]

    return of


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., Any]:
    """`timed(call, rounds, warmup, held)`: the last value of a call timed on the device's clock.

    The second-level cache is overwritten before every round. `held`: the device is held back until
    the call's launches are queued, so that the time is the device's alone.
    """
    benchmark._timer = clock

    def run(call: Callable[[], Any], rounds: int = 3, warmup: int = 1, held: bool = False) -> Any:
        for _ in range(warmup):
            call()
        ahead = lead(call) if held else 0.0

        def ready() -> None:
            flush()
            hold(ahead)

        return benchmark.pedantic(call, setup=ready, rounds=rounds)

    return run


@pytest.fixture
def peak() -> Callable[[Callable[[], Any]], tuple[Any, int | None]]:
    """`peak(call)`: a call's value, and the bytes that it allocates beyond what is held."""
    return with_peak


@pytest.fixture
def row(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """A dictionary that is kept as this benchmark's row, with its statistics, where it succeeds."""
    kept: dict[str, Any] = {}
    yield kept
    benchmark.extra_info.update(kept)
    path = rows_of(request.node)
    if path is None or not kept or benchmark.stats is None:
        return
    revision = ""
    with contextlib.suppress(OSError):  # where there is no git, its row is kept all the same
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=COMMITTED, capture_output=True, text=True, check=False
        ).stdout.strip()
    import transformers
    import triton

    stats = benchmark.stats.stats
    told = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
        "revision": revision or None,
        "date": datetime.now(UTC).date().isoformat(),
        "clock": {
            "rounds": stats.rounds,
            "median": stats.median,
            "quartiles": [stats.q1, stats.q3],
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {**read_rows(path), request.node.name: {**kept, **told}}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(rows, indent=1) + "\n")
    fresh.replace(path)
