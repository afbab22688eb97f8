"""The tiles that each fused kernel of second-order attention is shipped with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heat_fast import gpu


@dataclass(frozen=True)
class Tile:
    """Query `rows` and key `columns` of a tile, and the `probes` that share it."""

    rows: int
    columns: int
    probes: int
    warps: int
    stages: int


#: By architecture, then by the widest head that it serves.
Tiles = dict[int, dict[int, Tile]]

TANGENT: Tiles = {
    80: {64: Tile(64, 32, 1, 4, 2), 128: Tile(32, 32, 1, 4, 2)},
    90: {64: Tile(64, 32, 1, 4, 2), 128: Tile(64, 32, 1, 4, 2)},
}
PRIMAL = TANGENT
ROWS: Tiles = {
    80: {64: Tile(64, 32, 1, 4, 2), 128: Tile(16, 64, 1, 8, 2)},
    90: {64: Tile(64, 32, 1, 4, 2), 128: Tile(128, 32, 1, 8, 2)},
    100: {64: Tile(64, 32, 1, 4, 2), 128: Tile(64, 32, 1, 8, 2)},
}
# With 64 keys or more an H200's wider instructions would serve, but the sums of that many are
# spilled (8 bytes with 16 rows and 128 keys), and on sm_100 Triton 3.7 makes a trap of the kernel.
KEYS: Tiles = {
    80: {64: Tile(32, 32, 1, 4, 2), 96: Tile(64, 32, 1, 8, 1), 128: Tile(64, 32, 1, 8, 2)},
}

#: Rows of a tile of the one kernel that multiplies nothing.
SHIFT_ROWS = 16


def of(table: Tiles, device: torch.device | int, width: int) -> Tile:
    """A kernel's tile for heads of a width on a device, or a compute capability."""
    by_width = gpu.for_architecture(table, device)
    return by_width[min(widest for widest in by_width if width <= widest)]
