"""Other tiles than the shipped ones: what the kernels' tables should say for this GPU.

From the shipped tile a search goes to the fastest of its neighbours, in each of which one number is
halved or doubled (the pipeline's stages: one more or less), until none is faster or its time is
over. Neighbours are compiled by several processes, of which Triton keeps the code, and timed one
after the other. One that does not compile, or does not fit, is kept with the reason. Nothing is
changed: who reads `ratio` above 1 edits the table, and lets `make kernels` compile it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, fields, replace
from math import inf
from typing import Any

import cases
import pytest
import torch
from measuring import difference, seconds
from sizes import SMALL
from tiles import TABLES, compile_tile, trial

#: Many heads of width 128, few of it, and heads of width 256.
MODELS = [
    name for name in cases.MODELS if name in ("Llama-3.1-70B", "Qwen2.5-3B", "GPT-J-6B", "tiny")
]
#: What a search may take, in seconds and in tiles.
SEARCH_SECONDS, MOST = (30, 2) if SMALL else (60, 60)
ROUNDS = 1 if SMALL else 7
#: A tile has to be faster by this factor to be gone to.
WORTH = 1.02


@pytest.fixture(scope="session")
def compilers() -> Iterator[Executor]:
    """Processes that compile, each with a context of its own on the device."""
    count = 1 if SMALL else min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield pool


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles in which one number is another."""
    for field in fields(tile):
        value = getattr(tile, field.name)
        others = (value - 1, value + 1) if field.name == "stages" else (value // 2, 2 * value)
        least = 1 if field.name in ("stages", "warps", "probes") else 16
        yield from (replace(tile, **{field.name: other}) for other in others if other >= least)


def climb(
    shipped: Any, prepare: Callable[[Sequence[Any]], None], taken: Callable[[Any], float]
) -> tuple[Any, float]:
    """The tile of which no neighbour is faster, and its seconds; neighbours are prepared first."""
    best, least, seen = shipped, taken(shipped), {shipped}
    while True:
        fresh = [tile for tile in neighbours(best) if tile not in seen]
        seen.update(fresh)
        prepare(fresh)
        found = {tile: taken(tile) for tile in fresh}
        fastest = min(found, key=found.__getitem__, default=None)
        if fastest is None or not found[fastest] * WORTH <= least < inf:
            return best, least
        best, least = fastest, found[fastest]


@pytest.mark.parametrize(
    ("operation", "table"),
    [(operation, table) for operation, (_, tables) in TABLES.items() for table in tables],
)
@pytest.mark.parametrize("model", MODELS)
def test_tiles(
    operation: str,
    table: str,
    model: str,
    device: torch.device,
    compilers: Executor,
    timed: Callable[..., Any],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """The shipped tile, the best that was found, and all that were tried."""
    tried: list[dict[str, Any]] = []
    names = operation, table, model
    with trial(*names, device) as own:
        if own.shipped is None:
            pytest.skip(f"{model} is not served by {table}")
        own.put(own.shipped)
        expected, begin = own.case.kernel(), time.monotonic()

        def over() -> bool:
            return len(tried) >= MOST or time.monotonic() - begin > SEARCH_SECONDS

        def prepare(tiles: Sequence[Any]) -> None:
            if not over():
                wait([compilers.submit(compile_tile, tile, *names) for tile in tiles[:MOST]])

        def taken(tile: Any) -> float:
            """Seconds with a tile; infinite where it cannot be, or the search has lasted long."""
            if over():
                return inf
            own.put(tile)
            try:
                differs = difference(expected, own.case.kernel())
                if differs > own.case.rtol:
                    raise ArithmeticError(f"off by {differs:.1e}")
                found = seconds(own.case.kernel, ROUNDS)
            except Exception as error:  # whatever the compiler, the device or the mathematics says
                tried.append({**asdict(tile), "reason": f"{type(error).__name__}: {error}"[:200]})
                return inf
            tried.append({**asdict(tile), "seconds": found})
            return found

        best, least = climb(own.shipped, prepare, taken)
        assert least < inf, f"the shipped tile could not be timed: {tried[0].get('reason')}"
        own.put(best)
        timed(own.case.kernel, rounds=ROUNDS, held=True)
    row.update(
        operation=operation,
        table=table,
        model=model,
        length=cases.LENGTHS[0],
        dtype=cases.HALF,
        shipped=asdict(own.shipped),
        shipped_seconds=tried[0]["seconds"],
        best=asdict(best),
        seconds=benchmark.stats.stats.median,
        ratio=tried[0]["seconds"] / least,
        tried=tried,
    )
