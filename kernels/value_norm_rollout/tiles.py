"""The tiles that the gate's kernels are shipped with, and what their launches have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from heat_fast import gpu

#: Products of float32: three passes of the tensor cores, near full precision. See the README.
PRECISION = "tf32x3"
#: Bytes of the numbers that kernels are compiled for.
TYPES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Tile:
    """`rows`: what a program owns (tokens or keys); `columns`: what it takes at a time.

    `inner`: the part of a head's width that is multiplied at once. If that is all of it, a
    program's own rows are read once and kept.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


#: By architecture, then by (bytes of an input number, padded head width).
Tiles = dict[int, dict[tuple[int, int], Tile]]

NORMS: Tiles = {
    80: {
        (2, 64): Tile(128, 128, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 3),
        (2, 256): Tile(128, 64, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
        (4, 256): Tile(64, 32, 32, 4, 2),
    },
    90: {
        (2, 64): Tile(128, 128, 64, 8, 3),
        (2, 128): Tile(128, 128, 128, 8, 2),
        (2, 256): Tile(128, 128, 256, 8, 2),
        (4, 64): Tile(64, 32, 64, 4, 2),
        (4, 128): Tile(64, 32, 64, 4, 2),
        (4, 256): Tile(64, 32, 64, 4, 2),
    },
}
# One target: a tile of scores is queries by keys, and a matrix unit takes 64 queries at a time.
FLOW: Tiles = {
    80: {
        (2, 64): Tile(128, 64, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 2),
        (2, 256): Tile(64, 64, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
        (4, 256): Tile(64, 32, 32, 4, 2),
    },
    90: {
        (2, 64): Tile(128, 64, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 3),
        (2, 256): Tile(64, 64, 256, 4, 2),
        (4, 64): Tile(64, 64, 32, 4, 2),
        (4, 128): Tile(64, 64, 32, 4, 2),
        (4, 256): Tile(64, 64, 32, 4, 2),
    },
}
# Many targets: a tile of scores is keys by queries, the left factor of the product with `rho`.
FLOW_OF_MANY: Tiles = {
    80: {
        **FLOW[80],
        (2, 256): Tile(128, 32, 256, 8, 2),
        (4, 128): Tile(64, 32, 32, 8, 2),
        (4, 256): Tile(64, 32, 32, 8, 2),
    },
    90: {
        **FLOW[90],
        (2, 256): Tile(128, 32, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
        (4, 256): Tile(64, 32, 32, 4, 2),
    },
}


def padded(width: int) -> int:
    """The widths of the tables' tiles: masked above the head's own."""
    return max(64, int(triton.next_power_of_2(width)))


def of(table: Tiles, x: Tensor) -> Tile:
    """The tile for heads `x [.., D]`."""
    return gpu.for_architecture(table, x.device)[x.element_size(), padded(x.shape[-1])]


def constants(tile: Tile, width: int) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "WIDTH": width,
        "PADDED": padded(width),
        "INNER": tile.inner,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PRECISION": PRECISION,
    }


def shared_out(count: int, wanted: int, tile: Tile, least: int) -> tuple[int, int]:
    """Shares of a sum over `count`, and how many of it, whole tiles, each of them takes.

    As many as are `wanted`, with at least so many tiles each.
    """
    shares = max(1, min(wanted, triton.cdiv(count, least * tile.columns)))
    each = triton.cdiv(triton.cdiv(count, shares), tile.columns) * tile.columns
    return triton.cdiv(count, each), each
