"""Means over the windows of a long context: one door to their implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.errors import InputError
from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.window_mean import cuda, native, reference


def window_mean(
    rows: Tensor,
    index: Tensor,
    tokens: int,
    counted: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Means `[n, N]` over windows of their values `rows [W, n, L]`, N = `tokens`.

    `index [W, L]` (int64): the tokens of each window; `counted [W, L]` (bool): which of them count,
    all by default, the values of the others being 0. A token in no window has mean 0. `impl`: see
    `heat_fast.kernels.dispatch`.

    Raises `InputError` for shapes that do not fit and tokens outside `0..N-1`.

    Example:
        >>> rows = torch.tensor([[[1.0, 2.0]], [[4.0, 5.0]]])
        >>> window_mean(rows, torch.tensor([[0, 1], [1, 2]]), 3).tolist()
        [[1.0, 3.0, 5.0]]
    """
    shape = (rows.shape[0], rows.shape[-1]) if rows.dim() == 3 else None
    if shape is None or rows.numel() == 0 or not rows.is_floating_point():
        raise InputError(
            f"values of windows of shape {tuple(rows.shape)} ({rows.dtype}): expected [W, n, L] of "
            "floating point, without empty dimensions. Check the arguments."
        )
    if index.shape != shape or index.dtype != torch.int64:
        raise InputError(
            f"tokens of windows of shape {tuple(index.shape)} ({index.dtype}): expected {shape} of "
            "int64. Check the arguments."
        )
    if counted is not None and (counted.shape != shape or counted.dtype != torch.bool):
        raise InputError(
            f"counted tokens of shape {tuple(counted.shape)} ({counted.dtype}): expected {shape} "
            "of bool. Check the arguments."
        )
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= tokens:
        raise InputError(
            f"windows hold the tokens {low} to {high} of {tokens}: expected tokens of the prompt. "
            "Check the plan."
        )
    chosen = implementation("window_mean", impl, rows, offers=("native", "cuda"))
    run = {"reference": reference, "native": native, "cuda": cuda}[chosen].window_mean
    mean: Tensor = run(rows, index, tokens, counted)
    return mean
