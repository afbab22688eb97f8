"""Other tiles than the shipped ones: what the kernels' tables should say for this GPU.

From the shipped tile a search goes to the fastest of its neighbours, in each of which one number is
halved or doubled (the pipeline's stages: one more or less), until none is faster or its time is
over. A neighbour that does not compile, or does not fit, is kept with the reason. Nothing is
changed: who reads `ratio` above 1 edits the table, and lets `make kernels` compile it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

import cases
import pytest
import torch
from measuring import difference, seconds
from sizes import SMALL
from test_bench_kernels import OPERATIONS

from heat_fast import gpu

KERNELS = "heat_fast.kernels"
#: By operation: where the tables of its tiles are.
TABLES = {
    "attention_flow": ("value_norm_rollout.triton", ["_FLOW"]),
    "value_output_norms": ("value_norm_rollout.triton", ["_NORMS"]),
    "second_order_attention": ("second_order_attention.tiles", ["TANGENT", "ROWS", "KEYS"]),
    "branch_attention": ("branch_attention.triton", ["_TILES"]),
    "masked_kl": ("masked_kl.triton", ["_TILES"]),
    "coded_reduction": ("rademacher.triton", ["_TILES"]),
    "low_rank_block_norms": ("low_rank.triton", ["_TILES"]),
}
#: Many heads of width 128, few of it, and heads of width 256.
MODELS = [
    name for name in cases.MODELS if name in ("Llama-3.1-70B", "Qwen2.5-3B", "GPT-J-6B", "tiny")
]
#: What a search may take, in seconds and in tiles.
SEARCH_SECONDS, MOST = (30, 2) if SMALL else (45, 40)
ROUNDS = 1 if SMALL else 7
#: A tile has to be faster by this factor to be gone to.
WORTH = 1.02


class Asked(dict[Any, Any]):
    """Tiles by what they are for, which remembers for what one was asked."""

    key: Any = None

    def __getitem__(self, key: Any) -> Any:
        self.key = key
        return super().__getitem__(key)


@contextmanager
def placed(table: dict[int, Any], device: torch.device) -> Iterator[Callable[[Any], None]]:
    """A function that sets a device's entry of a table; as it was in the end."""
    before = dict(table)
    try:
        yield lambda entry: table.update({gpu.capability(device): entry})
    finally:
        table.clear()
        table.update(before)


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles in which one number is another."""
    for field in fields(tile):
        value = getattr(tile, field.name)
        others = (value - 1, value + 1) if field.name == "stages" else (value // 2, 2 * value)
        least = 1 if field.name in ("stages", "warps", "probes") else 16
        yield from (replace(tile, **{field.name: other}) for other in others if other >= least)


def climb(shipped: Any, taken: Callable[[Any], float]) -> tuple[Any, float]:
    """The tile of which no neighbour is faster, and its seconds."""
    best, least, seen = shipped, taken(shipped), {shipped}
    while True:
        fresh = [tile for tile in neighbours(best) if tile not in seen]
        seen.update(fresh)
        found = {tile: taken(tile) for tile in fresh}
        fastest = min(found, key=found.__getitem__, default=None)
        if fastest is None or found[fastest] * WORTH > least:
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
    timed: Callable[..., Any],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """The shipped tile, the best that was found, and all that were tried."""
    torch.manual_seed(0)
    inputs = cases.Inputs(device, getattr(torch, cases.HALF))
    case = OPERATIONS[operation](cases.MODELS[model], cases.LENGTHS[0], inputs)
    tiles = getattr(importlib.import_module(f"{KERNELS}.{TABLES[operation][0]}"), table)
    entry = gpu.for_architecture(tiles, device)
    tried: list[dict[str, Any]] = []

    with placed(tiles, device) as place:
        if isinstance(entry, dict):
            asked = Asked(entry)
            place(asked)
            expected = case.kernel()
            if asked.key is None:
                pytest.skip(f"{model} is not served by {table}")
            shipped = entry[asked.key]
        else:
            asked, expected, shipped = None, case.kernel(), entry

        begin = time.monotonic()

        def put(tile: Any) -> None:
            place(tile if asked is None else {**entry, asked.key: tile})

        def taken(tile: Any) -> float:
            """Seconds with a tile; infinite where it cannot be, or the search has lasted long."""
            if len(tried) >= MOST or time.monotonic() - begin > SEARCH_SECONDS:
                return float("inf")
            put(tile)
            try:
                differs = difference(expected, case.kernel())
                if differs > case.rtol:
                    raise ArithmeticError(f"off by {differs:.1e}")
                found = seconds(case.kernel, ROUNDS)
            except Exception as error:  # whatever the compiler, the device or the mathematics says
                tried.append({**asdict(tile), "reason": f"{type(error).__name__}: {error}"[:200]})
                return float("inf")
            tried.append({**asdict(tile), "seconds": found})
            return found

        best, least = climb(shipped, taken)
        put(best)
        timed(case.kernel, rounds=ROUNDS, held=True)
    row.update(
        operation=operation,
        table=table,
        model=model,
        length=cases.LENGTHS[0],
        dtype=cases.HALF,
        shipped=asdict(shipped),
        shipped_seconds=tried[0]["seconds"],
        best=asdict(best),
        seconds=benchmark.stats.stats.median,
        ratio=tried[0]["seconds"] / least,
        tried=tried,
    )
