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
def zero_parts(ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr):
    """Rows of sums, their columns in a tuple of parts."""
    sums = ()
    for _ in tl.static_range(PADDED // PART):
        sums = sums + (tl.zeros([ROWS, PART], dtype=tl.float32),)
    return sums


@triton.jit
def zero_rows(PROBES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr):
    """`zero_parts` for each of the probes."""
    sums = ()
    for _ in tl.static_range(PROBES):
        sums = sums + (zero_parts(ROWS, PADDED, PART),)
    return sums


@triton.jit
def load(pointer, first, count, part, ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr):
    """Columns `part .. part + INNER - 1` of rows `first .. first + ROWS - 1` of `[*, WIDTH]`.

    Zero from the `count`-th of these rows on, and from column `WIDTH` on.
    """
    rows = tl.arange(0, ROWS)
    inner = part + tl.arange(0, INNER)
    return tl.load(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def factor(
    pointer,
    first,
    count,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
):
    """Rows to be multiplied: read here if that is to happen in one piece, else where they are."""
    if INNER == PADDED:
        values = load(pointer, first, count, 0, ROWS, WIDTH, PADDED)
    else:
        values = 0
    return values, pointer, first, count, width


@triton.jit
def products(
    left,
    right,
    sums,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sums + left right'` of two `factor`s."""
    if INNER == PADDED:
        sums = tl.dot(left[0], tl.trans(right[0]), sums, input_precision=PRECISION)
    else:
        # As many steps as are known at run time alone are not unrolled: that would spill.
        for part in range(0, left[4], INNER):
            x = load(left[1], left[2], left[3], part, sums.shape[0], WIDTH, INNER)
            y = load(right[1], right[2], right[3], part, sums.shape[1], WIDTH, INNER)
            sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    return sums


@triton.jit
def mix(
    weights,
    factor,
    sums,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sums + weights factor`, the columns of the sums in a tuple of parts."""
    weights = weights.to(factor[1].dtype.element_ty)
    PART: tl.constexpr = sums[0].shape[1]
    parts = ()
    for c in tl.static_range(PADDED // PART):
        if INNER == PADDED:
            values = factor[0]
        else:
            values = load(factor[1], factor[2], factor[3], c * PART, weights.shape[1], WIDTH, PART)
        parts = parts + (tl.dot(weights, values, sums[c], input_precision=PRECISION),)
    return parts


@triton.jit
def store(pointer, first, count, part, values, WIDTH: tl.constexpr):
    """Write `values [R, C]` to columns `part ..` of the rows from `first` on."""
    rows = tl.arange(0, values.shape[0])
    inner = part + tl.arange(0, values.shape[1])
    tl.store(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        values.to(pointer.dtype.element_ty),
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
    )


@triton.jit
def factors(
    pointer,
    first,
    step,
    count,
    probes,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PROBES: tl.constexpr,
):
    """A tuple of the factors of each of a program's probes, `step` rows apart."""
    parts = ()
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, count, 0)
        parts = parts + (
            factor(pointer, first + p * step, some, width, ROWS, WIDTH, PADDED, INNER),
        )
    return parts


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
