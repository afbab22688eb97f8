# ruff: noqa: RUF005 - a kernel joins tuples by addition alone
# mypy: disable-error-code="assignment"
"""What the kernels of second-order attention have in common, on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from heat_fast.kernels.device import tanh


@triton.jit
def softmax_weights(scores, lse, seen, scale, softcap, CAPPED: tl.constexpr):
    """Softmax rows, and the soft-cap's `w = 1 - tanh^2` and `w./U. = -2 tanh w / cap`."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    slope = 1.0
    bend = 0.0
    if CAPPED:
        ratio = tanh(scores * (scale / softcap))
        slope = 1 - ratio * ratio
        bend = (-2 / softcap) * ratio * slope
        exponent = (ratio * softcap - lse) * LOG2_E
    else:
        exponent = scores * (scale * LOG2_E) - lse * LOG2_E
    return tl.where(seen, tl.exp2(exponent), 0.0), slope, bend


@triton.jit
def zeros(PROBES: tl.constexpr, ROWS: tl.constexpr):
    """A number for every row, for each of the probes."""
    sums = ()
    for _ in tl.static_range(PROBES):
        sums = sums + (tl.zeros([ROWS], dtype=tl.float32),)
    return sums


@triton.jit
def settle(rest, centre, sunk, PROBES: tl.constexpr):
    """`m - n` of every row, of `rest = rowsum(P o (S. - n))`, where a sink has the share `sunk`."""
    settled = ()
    for p in tl.static_range(PROBES):
        settled = settled + (rest[p] - centre[p] * sunk,)
    return settled


@triton.jit
def zero_rows(PROBES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Rows of sums for each of the probes."""
    sums = ()
    for _ in tl.static_range(PROBES):
        sums = sums + (tl.zeros([ROWS, PADDED], dtype=tl.float32),)
    return sums


@triton.jit
def load(pointer, first, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `first .. first + ROWS - 1` of `[*, WIDTH]`.

    Zero from the `count`-th of these rows on, and from column `WIDTH` on.
    """
    rows = tl.arange(0, ROWS)
    inner = tl.arange(0, PADDED)
    return tl.load(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def store(pointer, first, count, values, WIDTH: tl.constexpr):
    """Write `values [R, C]` to the rows from `first` on."""
    rows = tl.arange(0, values.shape[0])
    inner = tl.arange(0, values.shape[1])
    tl.store(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        values.to(pointer.dtype.element_ty),
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
    )


@triton.jit
def loads(
    pointer,
    first,
    step,
    count,
    probes,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PROBES: tl.constexpr,
):
    """`load` for each of a program's probes, `step` rows apart."""
    parts = ()
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, count, 0)
        parts = parts + (load(pointer, first + p * step, some, ROWS, WIDTH, PADDED),)
    return parts


@triton.jit
def products(left, right, sums):
    """`sums + left right'`."""
    return tl.dot(left, tl.trans(right), sums, input_precision="ieee")


@triton.jit
def mix(weights, values, sums):
    """`sums + weights values`, the weights rounded to the dtype of the values."""
    return tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")


@triton.jit
def statistics(pointer, first, count, ROWS: tl.constexpr, other: tl.constexpr):
    """Numbers `first .. first + ROWS - 1`, `other` from the `count`-th on."""
    rows = tl.arange(0, ROWS)
    return tl.load(pointer + first + rows, mask=rows < count, other=other)


@triton.jit
def seen_keys(first_row, count, group, first, window, ROWS: tl.constexpr, WINDOWED: tl.constexpr):
    """The first key that a tile of rows sees, and the one behind the last."""
    last_row = tl.minimum(first_row + ROWS, count) - 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, first + first_row // group - window + 1)
    return begin, first + last_row // group + 1
