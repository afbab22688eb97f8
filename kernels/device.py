"""Device functions that several GPU kernels share; imported by their `triton.py` alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """`tanh x` to a few units of float32's last place, also where x is small."""
    square = x * x
    # Below 0.2 the next term of the series, 21844/6081075 x^12, is under 2e-11.
    small = x * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    )
    large = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.2, small, tl.where(x < 0, -large, large))


@triton.jit
def soft_cap(scores, cap):
    """`cap tanh(scores / cap)`."""
    return cap * tanh(scores / cap)
