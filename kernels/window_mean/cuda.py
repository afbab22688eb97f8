"""Means over windows by the compiled CUDA kernels (csrc/cuda/): windows in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import cuda
from heat_fast.errors import InputError


def window_mean(rows: Tensor, index: Tensor, tokens: int, counted: Tensor | None) -> Tensor:
    """As the reference, for windows that hold no token twice; others raise `InputError`."""
    windows, count, length = rows.shape
    # Where each window holds each token: with it a mean is a gather, and sums run in order.
    places = index.new_full((windows, tokens), -1)
    places.scatter_(1, index, torch.arange(length, device=index.device).expand(windows, -1))
    if int((places >= 0).sum()) < index.numel():
        raise InputError(
            f"windows of {length} tokens that hold some twice: expected distinct tokens. Correct "
            "the plan, or use impl='reference'."
        )
    mask = None if counted is None else counted.contiguous()
    mean = rows.new_empty(count, tokens)
    rows = rows.contiguous()
    cuda.launch("window_mean", rows, rows, places, mask, mean)
    return mean
