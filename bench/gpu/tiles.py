"""An operation that runs with other tiles than those that are shipped; for `test_bench_tiles.py`.

A module of its own, so that processes that compile can import it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cases
import torch
from test_bench_kernels import OPERATIONS

from heat_fast import gpu

KERNELS = "heat_fast.kernels"
#: By operation: where the tables of its tiles are.
TABLES = {
    "attention_flow": ("value_norm_rollout.tiles", ["FLOW"]),
    "value_output_norms": ("value_norm_rollout.tiles", ["NORMS"]),
    "second_order_attention": ("second_order_attention.tiles", ["TANGENT", "ROWS", "KEYS"]),
    "branch_attention": ("branch_attention.triton", ["_TILES"]),
    "masked_kl": ("masked_kl.triton", ["_TILES"]),
    "coded_reduction": ("rademacher.triton", ["_TILES"]),
    "low_rank_block_norms": ("low_rank.triton", ["_TILES"]),
}


class Asked(dict[Any, Any]):
    """Tiles by what they are for, which remembers for what one was asked."""

    key: Any = None

    def __getitem__(self, key: Any) -> Any:
        self.key = key
        return super().__getitem__(key)


@dataclass(frozen=True)
class Trial:
    """One operation at one model's shape, and the tile that it runs with."""

    case: cases.Case
    table: dict[int, Any]
    capability: int
    entry: Any
    key: Any

    @property
    def shipped(self) -> Any:
        """The tile that is shipped for it; None where it runs without the table."""
        if not isinstance(self.entry, dict):
            return self.entry
        return None if self.key is None else self.entry[self.key]

    def put(self, tile: Any) -> None:
        """Let it run with another one."""
        keyed = isinstance(self.entry, dict)
        self.table[self.capability] = {**self.entry, self.key: tile} if keyed else tile


@contextmanager
def trial(operation: str, table: str, model: str, device: torch.device) -> Iterator[Trial]:
    """A trial; the table is as it was afterwards."""
    torch.manual_seed(0)
    inputs = cases.Inputs(device, getattr(torch, cases.HALF))
    case = OPERATIONS[operation](cases.MODELS[model], cases.LENGTHS[0], inputs)
    tiles = getattr(importlib.import_module(f"{KERNELS}.{TABLES[operation][0]}"), table)
    entry, before, capability = (
        gpu.for_architecture(tiles, device),
        dict(tiles),
        gpu.capability(device),
    )
    asked = Asked(entry) if isinstance(entry, dict) else None
    try:
        if asked is not None:
            tiles[capability] = asked
            case.kernel()
        yield Trial(case, tiles, capability, entry, asked and asked.key)
    finally:
        tiles.clear()
        tiles.update(before)


@lru_cache(maxsize=1)
def _lasting(*names: str) -> Any:
    """A trial, and the context that it lives in, until this process is asked for another."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = trial(*names, device)
    return context, context.__enter__()


def compile_tile(tile: Any, *names: str) -> None:
    """Let Triton keep the code of a tile; why there is none, the process that times it will see."""
    _, own = _lasting(*names)
    own.put(tile)
    with suppress(Exception):
        own.case.kernel()
