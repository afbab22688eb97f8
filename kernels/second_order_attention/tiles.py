"""The tiles that each fused kernel of second-order attention is shipped with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Query `rows` and key `columns` of a tile, and the `probes` that share it."""

    rows: int
    columns: int
    probes: int
    warps: int
    stages: int


#: By architecture, then by padded head width.
Tiles = dict[int, dict[int, Tile]]

TANGENT: Tiles = {
    80: {64: Tile(64, 32, 1, 4, 2), 128: Tile(32, 32, 1, 4, 2)},
    90: {64: Tile(64, 32, 1, 4, 2), 128: Tile(64, 32, 1, 4, 2)},
}
PRIMAL = TANGENT
ROWS: Tiles = {
    80: {64: Tile(64, 32, 1, 4, 2), 128: Tile(16, 32, 1, 8, 2)},
    90: {64: Tile(64, 32, 1, 4, 2), 128: Tile(128, 32, 1, 8, 2)},
    100: {64: Tile(64, 32, 1, 4, 2), 128: Tile(64, 32, 1, 8, 2)},
}
# With 16 rows and 128 columns some are spilled on sm_90 without a soft-cap, and on sm_100 Triton
# 3.7 makes a trap of the whole kernel.
KEYS: Tiles = {
    80: {64: Tile(32, 32, 1, 4, 2), 128: Tile(32, 32, 1, 8, 1)},
    90: {64: Tile(32, 32, 1, 4, 2), 128: Tile(32, 32, 1, 8, 2)},
}

#: Rows of a tile of the one kernel that multiplies nothing.
SHIFT_ROWS = 16
