"""Means over windows by the compiled extension (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import native


def window_mean(rows: Tensor, index: Tensor, tokens: int, counted: Tensor | None) -> Tensor:
    """As the reference."""
    mean = rows.new_empty(rows.shape[1], tokens)
    weights = None if counted is None else counted.to(rows.dtype).contiguous()
    # Named, so that the copies live until the call has returned.
    rows, index = rows.contiguous(), index.contiguous()
    native.module(rows.dtype).window_mean(
        native.array(rows),
        native.array(index),
        native.array(weights),
        native.array(mean),
        native.workspace(rows.dtype),
        torch.get_num_threads(),
    )
    return mean
