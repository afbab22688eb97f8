"""The tiles that each kernel of second-order attention is shipped with, by architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Query `rows` and key `columns` of a tile, and the `probes` that share it.

    `inner`: the part of a head's width over which rows are multiplied at once. If that is all of
    it, factors are read once a tile, what a program owns once; else where they are multiplied.
    `part`: the columns that are summed at once then. Few leave nothing to do for some of the warps,
    which hold the same sums, and need more addresses.
    """

    rows: int
    columns: int
    probes: int
    warps: int
    stages: int
    inner: int = 256
    part: int = 256


# By architecture, then by (bytes of an input number, padded head width).
TANGENT = {
    80: {
        (2, 64): Tile(64, 32, 1, 4, 2),
        (2, 128): Tile(32, 32, 1, 4, 2),
        (2, 256): Tile(32, 32, 1, 8, 1, 64, 64),
        (4, 64): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 128): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 256): Tile(16, 16, 1, 4, 1, 32, 128),
    },
}
TANGENT[90] = TANGENT[80] | {(2, 128): Tile(64, 32, 1, 4, 2)}
PRIMAL = TANGENT
ROWS = {
    80: {
        (2, 64): Tile(64, 32, 1, 4, 2),
        (2, 128): Tile(16, 32, 1, 8, 2),
        (2, 256): Tile(16, 32, 1, 8, 1, 64, 64),
        (4, 64): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 128): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 256): Tile(16, 16, 1, 8, 1, 32, 128),
    },
}
ROWS[90] = ROWS[80] | {(2, 128): Tile(128, 32, 1, 8, 2)}
ROWS[100] = ROWS[80] | {(2, 128): Tile(64, 32, 1, 8, 2)}
KEYS = {
    80: {
        (2, 64): Tile(32, 32, 1, 4, 2),
        (2, 128): Tile(32, 32, 1, 8, 1),
        (2, 256): Tile(16, 32, 1, 8, 1, 64, 64),
        (4, 64): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 128): Tile(16, 16, 1, 8, 1, 32, 128),
        (4, 256): Tile(16, 16, 1, 8, 1, 32, 128),
    },
}
# With 16 rows and 128 columns some are spilled on sm_90 without a soft-cap, and on sm_100 Triton
# 3.7 makes a trap of the whole kernel.
KEYS[90] = KEYS[80] | {(2, 128): Tile(32, 32, 1, 8, 2)}

#: Rows of a tile of the one kernel that multiplies nothing.
SHIFT_ROWS = 16
