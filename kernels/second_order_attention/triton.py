# ruff: noqa: RUF005 - a kernel joins tuples by addition alone
# mypy: disable-error-code="assignment"
"""Attention's tangent and tangent of adjoint on a GPU; `reference.py` has the mathematics.

Three kernels. Two own a tile of the rows of `[Q, G]` of one key-value head, for a group of probes,
and walk over the keys: they make `O.` and `Q_.`. The third owns a tile of keys and walks over the
rows: `K_.` and `V_.`. Every number is written by one program: no atomics, and the same result in
every run. A tile's `P`, `dP` and `dS` are formed once for the program's probes.

What a row's tangents are centred by, `m = rowsum(P o S.)`, is known only after its last key. Both
row kernels sum with another centre `n`, near it where the first tile holds most of the weight (the
first token of a context often does), and put it right at the end, as `P` and `dS` are the primal's:

    sum_j P. X + P X. = sum_j (P o (S. - n)) X + P X. - (m - n) sum_j P X

The kernel of the keys is handed `m`, `D` and `D.` of every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.branch_attention.native import heads_like
from heat_fast.kernels.branch_attention.triton import REGISTERS, compiled_options, padded
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.device import tanh
from heat_fast.kernels.second_order_attention.reference import Primal

#: Products of float32: three passes of the tensor cores, near full precision. See the README.
PRECISION = "tf32x3"


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
_TANGENT = {
    80: {
        (2, 64): Tile(64, 32, 1, 4, 2),
        (2, 128): Tile(32, 32, 1, 4, 2),
        (2, 256): Tile(32, 32, 1, 8, 1, 64, 64),
        (4, 64): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 128): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 256): Tile(16, 16, 1, 4, 1, 32, 128),
    },
}
_TANGENT[90] = _TANGENT[80] | {(2, 128): Tile(64, 32, 1, 4, 2)}
_PRIMAL = _TANGENT
_ROWS = {
    80: {
        (2, 64): Tile(64, 32, 1, 4, 2),
        (2, 128): Tile(16, 32, 1, 8, 2),
        (2, 256): Tile(16, 32, 1, 8, 1, 64, 64),
        (4, 64): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 128): Tile(16, 16, 1, 4, 1, 32, 128),
        (4, 256): Tile(16, 16, 1, 8, 1, 32, 128),
    },
}
_ROWS[90] = _ROWS[80] | {(2, 128): Tile(128, 32, 1, 8, 2)}
_ROWS[100] = _ROWS[80] | {(2, 128): Tile(64, 32, 1, 8, 2)}
_KEYS = {
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
_KEYS[90] = _KEYS[80] | {(2, 128): Tile(32, 32, 1, 8, 2)}

#: Rows of a tile of the one kernel that multiplies nothing.
_SHIFT_ROWS = 16


@triton.jit
def _weights(scores, lse, seen, scale, softcap, CAPPED: tl.constexpr):
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
def _zeros(PROBES: tl.constexpr, ROWS: tl.constexpr):
    """A number for every row, for each of the probes."""
    sums = ()
    for _ in tl.static_range(PROBES):
        sums = sums + (tl.zeros([ROWS], dtype=tl.float32),)
    return sums


@triton.jit
def _zero_parts(ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr):
    """Rows of sums, their columns in a tuple of parts."""
    sums = ()
    for _ in tl.static_range(PADDED // PART):
        sums = sums + (tl.zeros([ROWS, PART], dtype=tl.float32),)
    return sums


@triton.jit
def _zero_rows(PROBES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr):
    """`_zero_parts` for each of the probes."""
    sums = ()
    for _ in tl.static_range(PROBES):
        sums = sums + (_zero_parts(ROWS, PADDED, PART),)
    return sums


@triton.jit
def _load(
    pointer, first, count, part, ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr
):
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
def _factor(
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
        values = _load(pointer, first, count, 0, ROWS, WIDTH, PADDED)
    else:
        values = 0
    return values, pointer, first, count, width


@triton.jit
def _products(
    left,
    right,
    sums,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sums + left right'` of two `_factor`s."""
    if INNER == PADDED:
        sums = tl.dot(left[0], tl.trans(right[0]), sums, input_precision=PRECISION)
    else:
        # As many steps as are known at run time alone are not unrolled: that would spill.
        for part in range(0, left[4], INNER):
            x = _load(left[1], left[2], left[3], part, sums.shape[0], WIDTH, INNER)
            y = _load(right[1], right[2], right[3], part, sums.shape[1], WIDTH, INNER)
            sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _mix(
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
            values = _load(factor[1], factor[2], factor[3], c * PART, weights.shape[1], WIDTH, PART)
        parts = parts + (tl.dot(weights, values, sums[c], input_precision=PRECISION),)
    return parts


@triton.jit
def _store(pointer, first, count, part, values, WIDTH: tl.constexpr):
    """Write `values [R, C]` to columns `part ..` of the rows from `first` on."""
    rows = tl.arange(0, values.shape[0])
    inner = part + tl.arange(0, values.shape[1])
    tl.store(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        values.to(pointer.dtype.element_ty),
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
    )


@triton.jit
def _factors(
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
            _factor(pointer, first + p * step, some, width, ROWS, WIDTH, PADDED, INNER),
        )
    return parts


@triton.jit
def _statistics(pointer, first, count, ROWS: tl.constexpr, other: tl.constexpr):
    """Numbers `first .. first + ROWS - 1`, `other` from the `count`-th on."""
    rows = tl.arange(0, ROWS)
    return tl.load(pointer + first + rows, mask=rows < count, other=other)


@triton.jit
def _seen_keys(first_row, count, group, first, window, ROWS: tl.constexpr, WINDOWED: tl.constexpr):
    """The first key that a tile of rows sees, and the one behind the last."""
    last_row = tl.minimum(first_row + ROWS, count) - 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, first + first_row // group - window + 1)
    return begin, first + last_row // group + 1


@triton.jit
def attention_tangent_kernel(
    query,
    key,
    value,
    output,
    query_dot,
    key_dot,
    value_dot,
    result,
    normaliser,
    result_head,
    result_probe,
    result_member,
    result_row,
    heads,
    batch,
    group,
    queries,
    start,
    stop,
    window,
    width,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROBES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`O.` of a tile of rows `(query, member of the group)`, for a group of probes."""
    # Probes that share tiles run side by side; late queries, which see the most keys, come first.
    groups = (batch + PROBES - 1) // PROBES
    first_probe = tl.program_id(0) % groups * PROBES
    head = (tl.program_id(0) // groups % heads).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // (groups * heads) * ROWS
    probes = tl.minimum(batch - first_probe, PROBES)
    count = queries * group
    left = count - first_row
    first = stop - queries
    rows = first_row + tl.arange(0, ROWS)
    position = first + rows // group
    begin, end = _seen_keys(first_row, count, group, first, window, ROWS, WINDOWED)
    at_row = head * count + first_row
    at_probe = (head * batch + first_probe) * count + first_row

    q = _factor(query, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
    lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
    q_dot = _factors(
        query_dot, at_probe, count, left, probes, width, ROWS, WIDTH, PADDED, INNER, PROBES
    )
    centre = _zeros(PROBES, ROWS)
    rest = _zeros(PROBES, ROWS)
    total = _zero_rows(PROBES, ROWS, PADDED, PART)
    # Keys and values below `start` do not move: half the products of those above.
    for MOVED in tl.static_range(2):
        if MOVED:
            low = tl.maximum(begin, start)
            high = end
        else:
            low = begin
            high = start
        for at in range(low, high, COLUMNS):
            some = tl.minimum(high - at, COLUMNS)
            keys = at + tl.arange(0, COLUMNS)
            seen = (keys < high)[None, :] & (keys[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (keys[None, :] > position[:, None] - window)
            k = _factor(key, head * stop + at, some, width, COLUMNS, WIDTH, PADDED, INNER)
            v = _factor(value, head * stop + at, some, width, COLUMNS, WIDTH, PADDED, INNER)
            none = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            scores = _products(q, k, none, WIDTH, PADDED, INNER, PRECISION)
            weights, slope, _ = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            if MOVED:
                own = (head * batch + first_probe) * (stop - start) + at - start
                k_dot = _factors(
                    key_dot,
                    own,
                    stop - start,
                    some,
                    probes,
                    width,
                    COLUMNS,
                    WIDTH,
                    PADDED,
                    INNER,
                    PROBES,
                )
                v_dot = _factors(
                    value_dot,
                    own,
                    stop - start,
                    some,
                    probes,
                    width,
                    COLUMNS,
                    WIDTH,
                    PADDED,
                    INNER,
                    PROBES,
                )
            centres = ()
            rests = ()
            totals = ()
            for p in tl.static_range(PROBES):
                raw = _products(q_dot[p], k, none, WIDTH, PADDED, INNER, PRECISION)
                sums = total[p]
                if MOVED:
                    raw = _products(q, k_dot[p], raw, WIDTH, PADDED, INNER, PRECISION)
                    sums = _mix(weights, v_dot[p], sums, WIDTH, PADDED, INNER, PRECISION)
                moved = raw * (slope * scale)
                near = tl.where(at == begin, tl.sum(weights * moved, 1), centre[p])
                moved = weights * (moved - near[:, None])
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                totals = totals + (_mix(moved, v, sums, WIDTH, PADDED, INNER, PRECISION),)
            centre = centres
            rest = rests
            total = totals

    place = (rows // group).to(tl.int64) * result_row + (rows % group) * result_member
    for c in tl.static_range(PADDED // PART):
        o = _load(output, at_row, left, c * PART, ROWS, WIDTH, PART).to(tl.float32)
        inner = c * PART + tl.arange(0, PART)
        inside = (rows < count)[:, None] & (inner < WIDTH)[None, :]
        for p in tl.static_range(PROBES):
            base = result + head * result_head + (first_probe + p).to(tl.int64) * result_probe
            tl.store(
                base + place[:, None] + inner[None, :],
                (total[p][c] - rest[p][:, None] * o).to(result.dtype.element_ty),
                mask=inside & (p < probes),
            )


@triton.jit
def adjoint_rows_kernel(
    query,
    key,
    value,
    output,
    output_bar,
    normaliser,
    shift,
    pulled,
    heads,
    batch,
    group,
    queries,
    start,
    stop,
    window,
    width,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROBES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`pulled` (Q_) and `shift` (D) of a tile of rows: what all probes' `Q_.` share."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads * ROWS
    count = queries * group
    left = count - first_row
    first = stop - queries
    rows = tl.arange(0, ROWS)
    position = first + (first_row + rows) // group
    begin, end = _seen_keys(first_row, count, group, first, window, ROWS, WINDOWED)
    at_row = head * count + first_row

    q = _factor(query, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
    o_bar = _factor(output_bar, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
    d = tl.zeros([ROWS], dtype=tl.float32)
    for c in tl.static_range(PADDED // INNER):
        o = _load(output, at_row, left, c * INNER, ROWS, WIDTH, INNER).to(tl.float32)
        pulling = _load(output_bar, at_row, left, c * INNER, ROWS, WIDTH, INNER).to(tl.float32)
        d += tl.sum(pulling * o, 1)
    tl.store(shift + at_row + rows, d, mask=rows < left)
    lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
    total = _zero_parts(ROWS, PADDED, PART)
    for at in range(begin, end, COLUMNS):
        some = tl.minimum(end - at, COLUMNS)
        keys = at + tl.arange(0, COLUMNS)
        seen = (keys < end)[None, :] & (keys[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (keys[None, :] > position[:, None] - window)
        k = _factor(key, head * stop + at, some, width, COLUMNS, WIDTH, PADDED, INNER)
        v = _factor(value, head * stop + at, some, width, COLUMNS, WIDTH, PADDED, INNER)
        none = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        scores = _products(q, k, none, WIDTH, PADDED, INNER, PRECISION)
        weights, slope, _ = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
        centred = _products(o_bar, v, none, WIDTH, PADDED, INNER, PRECISION) - d[:, None]
        bent = weights * centred * slope
        total = _mix(bent, k, total, WIDTH, PADDED, INNER, PRECISION)
    for c in tl.static_range(PADDED // PART):
        _store(pulled, at_row, left, c * PART, scale * total[c], WIDTH)


@triton.jit
def shift_tangent_kernel(
    output,
    output_bar,
    output_dot,
    output_bar_dot,
    shift_dot,
    heads,
    batch,
    count,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`shift_dot` (D.) of a tile of rows of one probe."""
    probe = tl.program_id(0) % batch
    head = (tl.program_id(0) // batch % heads).to(tl.int64)
    first_row = tl.program_id(0) // (batch * heads) * ROWS
    left = count - first_row
    at_row = head * count + first_row
    at_probe = (head * batch + probe) * count + first_row
    o = _load(output, at_row, left, 0, ROWS, WIDTH, PADDED).to(tl.float32)
    o_bar = _load(output_bar, at_row, left, 0, ROWS, WIDTH, PADDED).to(tl.float32)
    o_dot = _load(output_dot, at_probe, left, 0, ROWS, WIDTH, PADDED).to(tl.float32)
    o_bar_dot = _load(output_bar_dot, at_probe, left, 0, ROWS, WIDTH, PADDED).to(tl.float32)
    rows = tl.arange(0, ROWS)
    total = tl.sum(o_bar_dot * o + o_bar * o_dot, 1)
    tl.store(shift_dot + at_probe + rows, total, mask=rows < left)


@triton.jit
def adjoint_tangent_rows_kernel(
    query,
    key,
    value,
    output_bar,
    query_dot,
    key_dot,
    value_dot,
    output_bar_dot,
    result,
    normaliser,
    shift,
    pulled,
    shift_dot,
    mean,
    heads,
    batch,
    group,
    queries,
    start,
    stop,
    window,
    width,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROBES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Q_.` of a tile of rows, for a group of probes; hands over `mean` (m) of every row."""
    groups = (batch + PROBES - 1) // PROBES
    first_probe = tl.program_id(0) % groups * PROBES
    head = (tl.program_id(0) // groups % heads).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // (groups * heads) * ROWS
    probes = tl.minimum(batch - first_probe, PROBES)
    count = queries * group
    left = count - first_row
    first = stop - queries
    rows = first_row + tl.arange(0, ROWS)
    position = first + rows // group
    begin, end = _seen_keys(first_row, count, group, first, window, ROWS, WINDOWED)
    at_row = head * count + first_row
    at_probe = (head * batch + first_probe) * count + first_row

    q = _factor(query, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
    o_bar = _factor(output_bar, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
    lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
    d = _statistics(shift, at_row, left, ROWS, 0.0)
    q_dot = _factors(
        query_dot, at_probe, count, left, probes, width, ROWS, WIDTH, PADDED, INNER, PROBES
    )
    o_bar_dot = _factors(
        output_bar_dot, at_probe, count, left, probes, width, ROWS, WIDTH, PADDED, INNER, PROBES
    )
    d_dot = ()
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        d_dot = d_dot + (_statistics(shift_dot, at_probe + p * count, some, ROWS, 0.0),)
    centre = _zeros(PROBES, ROWS)
    rest = _zeros(PROBES, ROWS)
    total = _zero_rows(PROBES, ROWS, PADDED, PART)
    for MOVED in tl.static_range(2):
        if MOVED:
            low = tl.maximum(begin, start)
            high = end
        else:
            low = begin
            high = start
        for at in range(low, high, COLUMNS):
            some = tl.minimum(high - at, COLUMNS)
            keys = at + tl.arange(0, COLUMNS)
            seen = (keys < high)[None, :] & (keys[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (keys[None, :] > position[:, None] - window)
            k = _factor(key, head * stop + at, some, width, COLUMNS, WIDTH, PADDED, INNER)
            v = _factor(value, head * stop + at, some, width, COLUMNS, WIDTH, PADDED, INNER)
            none = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            scores = _products(q, k, none, WIDTH, PADDED, INNER, PRECISION)
            weights, slope, bend = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            centred = _products(o_bar, v, none, WIDTH, PADDED, INNER, PRECISION) - d[:, None]
            plain = weights * centred
            bent = (plain * slope).to(key.dtype.element_ty)
            if MOVED:
                own = (head * batch + first_probe) * (stop - start) + at - start
                k_dot = _factors(
                    key_dot,
                    own,
                    stop - start,
                    some,
                    probes,
                    width,
                    COLUMNS,
                    WIDTH,
                    PADDED,
                    INNER,
                    PROBES,
                )
                v_dot = _factors(
                    value_dot,
                    own,
                    stop - start,
                    some,
                    probes,
                    width,
                    COLUMNS,
                    WIDTH,
                    PADDED,
                    INNER,
                    PROBES,
                )
            centres = ()
            rests = ()
            totals = ()
            for p in tl.static_range(PROBES):
                raw = _products(q_dot[p], k, none, WIDTH, PADDED, INNER, PRECISION)
                if MOVED:
                    raw = _products(q, k_dot[p], raw, WIDTH, PADDED, INNER, PRECISION)
                raw *= scale
                moved = raw * slope
                near = tl.where(at == begin, tl.sum(weights * moved, 1), centre[p])
                moved = weights * (moved - near[:, None])
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                dotted = _products(o_bar_dot[p], v, none, WIDTH, PADDED, INNER, PRECISION)
                if MOVED:
                    dotted = _products(o_bar, v_dot[p], dotted, WIDTH, PADDED, INNER, PRECISION)
                dotted = moved * centred + weights * (dotted - d_dot[p][:, None])
                if CAPPED:
                    dotted = dotted * slope + bend * raw * plain
                sums = total[p]
                if MOVED:
                    sums = _mix(bent, k_dot[p], sums, WIDTH, PADDED, INNER, PRECISION)
                totals = totals + (_mix(dotted, k, sums, WIDTH, PADDED, INNER, PRECISION),)
            centre = centres
            rest = rests
            total = totals

    rows = tl.arange(0, ROWS)
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        tl.store(mean + at_probe + p * count + rows, centre[p] + rest[p], mask=rows < some)
    for c in tl.static_range(PADDED // PART):
        adjoint = _load(pulled, at_row, left, c * PART, ROWS, WIDTH, PART)
        for p in tl.static_range(PROBES):
            some = tl.where(p < probes, left, 0)
            values = scale * total[p][c] - rest[p][:, None] * adjoint
            _store(result, at_probe + p * count, some, c * PART, values, WIDTH)


@triton.jit
def adjoint_tangent_keys_kernel(
    query,
    key,
    value,
    output_bar,
    query_dot,
    key_dot,
    value_dot,
    output_bar_dot,
    key_result,
    value_result,
    normaliser,
    shift,
    shift_dot,
    mean,
    heads,
    batch,
    group,
    queries,
    start,
    stop,
    window,
    width,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROBES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`K_.` and `V_.` of a tile of keys from `start` on, for a group of probes.

    Scores lie transposed, `[K, R]`, as the products that are summed over rows take them.
    """
    groups = (batch + PROBES - 1) // PROBES
    first_probe = tl.program_id(0) % groups * PROBES
    head = (tl.program_id(0) // groups % heads).to(tl.int64)
    # Early keys are seen by the most queries: their programs come first.
    lowest = start + tl.program_id(0) // (groups * heads) * COLUMNS
    probes = tl.minimum(batch - first_probe, PROBES)
    count = queries * group
    first = stop - queries
    some = stop - lowest
    keys = lowest + tl.arange(0, COLUMNS)
    moving = stop - start
    own = (head * batch + first_probe) * moving + lowest - start

    k = _factor(key, head * stop + lowest, some, width, COLUMNS, WIDTH, PADDED, INNER)
    v = _factor(value, head * stop + lowest, some, width, COLUMNS, WIDTH, PADDED, INNER)
    k_dot = _factors(
        key_dot, own, moving, some, probes, width, COLUMNS, WIDTH, PADDED, INNER, PROBES
    )
    v_dot = _factors(
        value_dot, own, moving, some, probes, width, COLUMNS, WIDTH, PADDED, INNER, PROBES
    )
    key_total = _zero_rows(PROBES, COLUMNS, PADDED, PART)
    value_total = _zero_rows(PROBES, COLUMNS, PADDED, PART)
    begin = tl.maximum(0, lowest - first) * group
    end = count
    if WINDOWED:
        end = tl.minimum(count, (lowest + COLUMNS - 1 + window - first) * group)
    for low in range(begin, end, ROWS):
        left = count - low
        rows = low + tl.arange(0, ROWS)
        position = first + rows // group
        at_row = head * count + low
        at_probe = (head * batch + first_probe) * count + low
        seen = keys[:, None] <= position[None, :]
        if WINDOWED:
            seen = seen & (keys[:, None] > position[None, :] - window)
        q = _factor(query, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
        o_bar = _factor(output_bar, at_row, left, width, ROWS, WIDTH, PADDED, INNER)
        q_dot = _factors(
            query_dot, at_probe, count, left, probes, width, ROWS, WIDTH, PADDED, INNER, PROBES
        )
        o_bar_dot = _factors(
            output_bar_dot, at_probe, count, left, probes, width, ROWS, WIDTH, PADDED, INNER, PROBES
        )
        # A row beyond the last has an infinite normaliser, so no weight.
        lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
        d = _statistics(shift, at_row, left, ROWS, 0.0)
        none = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
        scores = _products(k, q, none, WIDTH, PADDED, INNER, PRECISION)
        weights, slope, bend = _weights(scores, lse[None, :], seen, scale, softcap, CAPPED)
        centred = _products(v, o_bar, none, WIDTH, PADDED, INNER, PRECISION) - d[None, :]
        plain = weights * centred
        bent = (plain * slope).to(query.dtype.element_ty)
        key_totals = ()
        value_totals = ()
        for p in tl.static_range(PROBES):
            inside = tl.where(p < probes, left, 0)
            m = _statistics(mean, at_probe + p * count, inside, ROWS, 0.0)
            d_dot = _statistics(shift_dot, at_probe + p * count, inside, ROWS, 0.0)
            raw = _products(k, q_dot[p], none, WIDTH, PADDED, INNER, PRECISION)
            raw = _products(k_dot[p], q, raw, WIDTH, PADDED, INNER, PRECISION) * scale
            moved = weights * (raw * slope - m[None, :])
            dotted = _products(v, o_bar_dot[p], none, WIDTH, PADDED, INNER, PRECISION)
            dotted = _products(v_dot[p], o_bar, dotted, WIDTH, PADDED, INNER, PRECISION)
            dotted = moved * centred + weights * (dotted - d_dot[None, :])
            if CAPPED:
                dotted = dotted * slope + bend * raw * plain
            sums = _mix(moved, o_bar, value_total[p], WIDTH, PADDED, INNER, PRECISION)
            value_totals = value_totals + (
                _mix(weights, o_bar_dot[p], sums, WIDTH, PADDED, INNER, PRECISION),
            )
            sums = _mix(dotted, q, key_total[p], WIDTH, PADDED, INNER, PRECISION)
            key_totals = key_totals + (_mix(bent, q_dot[p], sums, WIDTH, PADDED, INNER, PRECISION),)
        key_total = key_totals
        value_total = value_totals

    for p in tl.static_range(PROBES):
        inside = tl.where(p < probes, some, 0)
        for c in tl.static_range(PADDED // PART):
            _store(key_result, own + p * moving, inside, c * PART, scale * key_total[p][c], WIDTH)
            _store(value_result, own + p * moving, inside, c * PART, value_total[p][c], WIDTH)


def _rows_first(x: Tensor) -> Tensor:
    """`[Hk, ..., G, Q, D] -> [Hk, ..., Q, G, D]`, contiguous: the rows that a program owns."""
    return x.transpose(-2, -3).contiguous()


def _trunk(primal: Primal) -> list[Tensor]:
    """Query, key and value as the kernels take them."""
    return [_rows_first(primal.query), primal.key.contiguous(), primal.value.contiguous()]


def _normaliser(primal: Primal) -> Tensor:
    return primal.normaliser.transpose(-1, -2).contiguous()


def _tile(table: dict[int, dict[tuple[int, int], Tile]], x: Tensor) -> Tile:
    return gpu.for_architecture(table, x.device)[x.element_size(), padded(x.shape[-1])]


def _sizes(primal: Primal, batch: int) -> tuple[float, ...]:
    heads, group, queries, width = primal.query.shape
    masking, stop = primal.masking, primal.key.shape[1]
    window, softcap = masking.window or 0, masking.softcap or 0.0
    places = (primal.start, stop, window)
    return heads, batch, group, queries, *places, width, masking.scale, softcap


def _constants(width: int, tile: Tile, windowed: bool, capped: bool) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "WIDTH": width,
        "PADDED": padded(width),
        "INNER": min(tile.inner, padded(width)),
        "PART": min(tile.part, padded(width)),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PROBES": tile.probes,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "PRECISION": PRECISION,
    }


def _launch(primal: Primal, tile: Tile) -> dict[str, Any]:
    """Those constants, and how many threads run a program."""
    masking, width = primal.masking, primal.query.shape[-1]
    windowed, capped = masking.window is not None, masking.softcap is not None
    return _constants(width, tile, windowed, capped) | {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": REGISTERS,
    }


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the reference; summed in float32."""
    heads, batch, group, queries, width = query.shape
    result = heads_like(query, width)
    tile = _tile(_TANGENT, query)
    blocks = triton.cdiv(queries * group, tile.rows) * triton.cdiv(batch, tile.probes)
    with gpu.on(query):
        attention_tangent_kernel[(blocks * heads,)](
            *_trunk(primal),
            _rows_first(primal.output),
            _rows_first(query),
            key.contiguous(),
            value.contiguous(),
            result,
            _normaliser(primal),
            *result.stride()[:-1],
            *_sizes(primal, batch),
            **_launch(primal, tile),
        )
    return result


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; summed in float32."""
    heads, batch, group, queries, width = query.shape
    count, dtype, back = queries * group, query.dtype, None
    if dtype == torch.float16:
        # Adjoints are small, and their products with weights would drop out of float16's range.
        # All results are linear in them: they are scaled by a power of two, and scaled back.
        largest = torch.maximum(output_bar.abs().amax(), output_bar_dot.abs().amax()).float()
        back = torch.exp2(torch.log2(largest.clamp(min=2.0**-24)).floor())
        output_bar, output_bar_dot = ((x / back).to(dtype) for x in (output_bar, output_bar_dot))
    trunk, normaliser = _trunk(primal), _normaliser(primal)
    primal_output, query, output, output_bar, output_bar_dot = (
        _rows_first(x) for x in (primal.output, query, output, output_bar, output_bar_dot)
    )
    key, value = key.contiguous(), value.contiguous()
    shift, pulled = (
        torch.empty(heads, count, *last, dtype=torch.float32, device=query.device)
        for last in ((), (width,))
    )
    shift_dot, mean = shift.new_empty(2, heads, batch, count)
    sums = dtype if back is None else torch.float32
    results = [torch.empty_like(x, dtype=sums) for x in (query, key, value)]
    moved = [output_bar, query, key, value, output_bar_dot]
    sizes = _sizes(primal, batch)
    with gpu.on(query):
        tile = _tile(_PRIMAL, query)
        adjoint_rows_kernel[(triton.cdiv(count, tile.rows) * heads,)](
            *trunk,
            primal_output,
            output_bar,
            normaliser,
            shift,
            pulled,
            *sizes,
            **_launch(primal, tile),
        )
        shift_tangent_kernel[(triton.cdiv(count, _SHIFT_ROWS) * heads * batch,)](
            primal_output,
            output_bar,
            output,
            output_bar_dot,
            shift_dot,
            heads,
            batch,
            count,
            WIDTH=width,
            PADDED=padded(width),
            ROWS=_SHIFT_ROWS,
        )
        tile = _tile(_ROWS, query)
        blocks = triton.cdiv(count, tile.rows) * triton.cdiv(batch, tile.probes)
        adjoint_tangent_rows_kernel[(blocks * heads,)](
            *trunk,
            *moved,
            results[0],
            normaliser,
            shift,
            pulled,
            shift_dot,
            mean,
            *sizes,
            **_launch(primal, tile),
        )
        tile = _tile(_KEYS, query)
        blocks = triton.cdiv(key.shape[2], tile.columns) * triton.cdiv(batch, tile.probes)
        adjoint_tangent_keys_kernel[(blocks * heads,)](
            *trunk,
            *moved,
            *results[1:],
            normaliser,
            shift,
            shift_dot,
            mean,
            *sizes,
            **_launch(primal, tile),
        )
    if back is not None:
        results = [(x * back).to(dtype) for x in results]
    return results[0].transpose(-2, -3), results[1], results[2]


_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def variants(capability: int) -> Iterator[Variant]:
    """Every kernel as it is launched on an architecture."""
    kernels = (
        (attention_tangent_kernel, _TANGENT),
        (adjoint_rows_kernel, _PRIMAL),
        (adjoint_tangent_rows_kernel, _ROWS),
        (adjoint_tangent_keys_kernel, _KEYS),
    )
    for kernel, table in kernels:
        names = kernel.arg_names
        numbers = names.index("heads")
        floats = ("normaliser", "shift", "pulled", "shift_dot", "mean")
        for dtype, width, masked in compiled_options():
            tile = gpu.for_architecture(table, capability)[_BYTES[dtype], padded(width)]
            yield Variant(
                kernel,
                f"{dtype} D {width}{', masked' if masked else ''}",
                {
                    **dict.fromkeys(names[:numbers], f"*{dtype}"),
                    **{name: "*fp32" for name in floats if name in names},
                    **{name: "i32:16" for name in names if name.startswith("result_")},
                    **dict.fromkeys(names[numbers : names.index("scale")], "i32"),
                    "scale": "fp32",
                    "softcap": "fp32",
                },
                _constants(width, tile, masked, masked),
                tile.warps,
                tile.stages,
                {"maxnreg": REGISTERS},
            )
    names = shift_tangent_kernel.arg_names
    for dtype, width, masked in compiled_options():
        if masked:
            yield Variant(
                shift_tangent_kernel,
                f"{dtype} D {width}",
                {
                    **dict.fromkeys(names[:4], f"*{dtype}"),
                    "shift_dot": "*fp32",
                    **dict.fromkeys(names[5:8], "i32"),
                },
                {"WIDTH": width, "PADDED": padded(width), "ROWS": _SHIFT_ROWS},
            )
