"""Rotation and change of layout in one pass, by the compiled extension (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import native
from heat_fast.kernels.rotary.reference import Table


def place(x: Tensor, target: Tensor, table: Table | None, sign: int) -> None:
    """As the reference, for float32 and float64."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    native.module(x.dtype).rotate(
        native.array(x),
        native.array(target),
        None if table is None else native.array(table.cos),
        None if table is None else native.array(table.sin),
        float(sign),
        table is not None and table.interleaved,
        torch.get_num_threads(),
    )
