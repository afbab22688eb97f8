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
from heat_fast.kernels.branch_attention.triton import padded
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.device import tanh
from heat_fast.kernels.second_order_attention.reference import Primal

#: Products of float32: three passes of the tensor cores, near full precision. See the README.
PRECISION = "tf32x3"


@dataclass(frozen=True)
class Tile:
    """Query `rows` and key `columns` of a tile, and the `probes` that share it."""

    rows: int
    columns: int
    probes: int
    warps: int
    stages: int


# By architecture, then by (bytes of an input number, padded head width).
_TANGENT = {
    80: {
        (2, 64): Tile(64, 64, 2, 4, 2),
        (2, 128): Tile(64, 64, 2, 8, 1),
        (2, 256): Tile(64, 32, 1, 8, 1),
        (4, 64): Tile(32, 32, 2, 4, 1),
        (4, 128): Tile(32, 32, 1, 4, 1),
        (4, 256): Tile(16, 16, 1, 4, 1),
    },
}
_PRIMAL = _TANGENT
_ROWS = {
    80: {
        (2, 64): Tile(64, 64, 2, 8, 1),
        (2, 128): Tile(64, 32, 1, 8, 1),
        (2, 256): Tile(32, 32, 1, 8, 1),
        (4, 64): Tile(32, 32, 1, 4, 1),
        (4, 128): Tile(32, 32, 1, 8, 1),
        (4, 256): Tile(16, 16, 1, 4, 1),
    },
}
_KEYS = {
    80: {
        (2, 64): Tile(64, 64, 2, 8, 1),
        (2, 128): Tile(32, 64, 1, 8, 1),
        (2, 256): Tile(32, 32, 1, 8, 1),
        (4, 64): Tile(32, 32, 1, 4, 1),
        (4, 128): Tile(32, 32, 1, 8, 1),
        (4, 256): Tile(16, 16, 1, 4, 1),
    },
}


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
def _zeros(COUNT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """A tuple of `COUNT` sums, `[FIRST, SECOND]`, or `[FIRST]` where `SECOND` is 0."""
    sums = ()
    for _ in tl.static_range(COUNT):
        if SECOND == 0:
            each = tl.zeros([FIRST], dtype=tl.float32)
        else:
            each = tl.zeros([FIRST, SECOND], dtype=tl.float32)
        sums = sums + (each,)
    return sums


@triton.jit
def _load(pointer, first, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `first .. first + ROWS - 1` of a matrix `[*, WIDTH]`, zero from the `count`-th on."""
    rows = tl.arange(0, ROWS)
    inner = tl.arange(0, PADDED)
    return tl.load(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _store(pointer, first, count, values, WIDTH: tl.constexpr):
    """Write `values [R, PADDED]` where `_load` reads them."""
    rows = tl.arange(0, values.shape[0])
    inner = tl.arange(0, values.shape[1])
    tl.store(
        pointer + first * WIDTH + rows[:, None] * WIDTH + inner[None, :],
        values.to(pointer.dtype.element_ty),
        mask=(rows < count)[:, None] & (inner < WIDTH)[None, :],
    )


@triton.jit
def _load_each(
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
    """A tuple of the rows of each of a program's probes, `step` rows apart."""
    parts = ()
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, count, 0)
        parts = parts + (_load(pointer, first + p * step, some, ROWS, WIDTH, PADDED),)
    return parts


@triton.jit
def _statistics(pointer, first, count, ROWS: tl.constexpr, other: tl.constexpr):
    """Numbers `first .. first + ROWS - 1`, `other` from the `count`-th on."""
    rows = tl.arange(0, ROWS)
    return tl.load(pointer + first + rows, mask=rows < count, other=other)


@triton.jit
def _seen_keys(
    first_row, count, group, first, window, ROWS: tl.constexpr, WINDOWED: tl.constexpr
):
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
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
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

    q = _load(query, at_row, left, ROWS, WIDTH, PADDED)
    lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
    q_dot = _load_each(query_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
    centre = _zeros(PROBES, ROWS, 0)
    rest = _zeros(PROBES, ROWS, 0)
    total = _zeros(PROBES, ROWS, PADDED)
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
            k = _load(key, head * stop + at, some, COLUMNS, WIDTH, PADDED)
            v = _load(value, head * stop + at, some, COLUMNS, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights, slope, _ = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            if MOVED:
                own = (head * batch + first_probe) * (stop - start) + at - start
                k_dot = _load_each(
                    key_dot, own, stop - start, some, probes, COLUMNS, WIDTH, PADDED, PROBES
                )
                v_dot = _load_each(
                    value_dot, own, stop - start, some, probes, COLUMNS, WIDTH, PADDED, PROBES
                )
            centres = ()
            rests = ()
            totals = ()
            for p in tl.static_range(PROBES):
                raw = tl.dot(q_dot[p], tl.trans(k), input_precision=PRECISION)
                sums = total[p]
                if MOVED:
                    raw = tl.dot(q, tl.trans(k_dot[p]), raw, input_precision=PRECISION)
                    sums = tl.dot(weights.to(v.dtype), v_dot[p], sums, input_precision=PRECISION)
                moved = raw * (slope * scale)
                near = tl.where(at == begin, tl.sum(weights * moved, 1), centre[p])
                moved = weights * (moved - near[:, None])
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                totals = totals + (tl.dot(moved.to(v.dtype), v, sums, input_precision=PRECISION),)
            centre = centres
            rest = rests
            total = totals

    o = _load(output, at_row, left, ROWS, WIDTH, PADDED)
    inner = tl.arange(0, PADDED)
    place = (rows // group).to(tl.int64) * result_row + (rows % group) * result_member
    for p in tl.static_range(PROBES):
        base = result + head * result_head + (first_probe + p).to(tl.int64) * result_probe
        tl.store(
            base + place[:, None] + inner[None, :],
            (total[p] - rest[p][:, None] * o.to(tl.float32)).to(result.dtype.element_ty),
            mask=(rows < count)[:, None] & (inner < WIDTH)[None, :] & (p < probes),
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
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
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

    q = _load(query, at_row, left, ROWS, WIDTH, PADDED)
    o_bar = _load(output_bar, at_row, left, ROWS, WIDTH, PADDED)
    o = _load(output, at_row, left, ROWS, WIDTH, PADDED)
    d = tl.sum(o_bar.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(shift + at_row + rows, d, mask=rows < left)
    lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for at in range(begin, end, COLUMNS):
        some = tl.minimum(end - at, COLUMNS)
        keys = at + tl.arange(0, COLUMNS)
        seen = (keys < end)[None, :] & (keys[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (keys[None, :] > position[:, None] - window)
        k = _load(key, head * stop + at, some, COLUMNS, WIDTH, PADDED)
        v = _load(value, head * stop + at, some, COLUMNS, WIDTH, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights, slope, _ = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
        centred = tl.dot(o_bar, tl.trans(v), input_precision=PRECISION) - d[:, None]
        bent = weights * centred * slope
        total = tl.dot(bent.to(k.dtype), k, total, input_precision=PRECISION)
    _store(pulled, at_row, left, scale * total, WIDTH)


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
    o = _load(output, at_row, left, ROWS, WIDTH, PADDED).to(tl.float32)
    o_bar = _load(output_bar, at_row, left, ROWS, WIDTH, PADDED).to(tl.float32)
    o_dot = _load(output_dot, at_probe, left, ROWS, WIDTH, PADDED).to(tl.float32)
    o_bar_dot = _load(output_bar_dot, at_probe, left, ROWS, WIDTH, PADDED).to(tl.float32)
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
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
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

    q = _load(query, at_row, left, ROWS, WIDTH, PADDED)
    o_bar = _load(output_bar, at_row, left, ROWS, WIDTH, PADDED)
    lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
    d = _statistics(shift, at_row, left, ROWS, 0.0)
    q_dot = _load_each(query_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
    o_bar_dot = _load_each(
        output_bar_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES
    )
    d_dot = ()
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        d_dot = d_dot + (_statistics(shift_dot, at_probe + p * count, some, ROWS, 0.0),)
    centre = _zeros(PROBES, ROWS, 0)
    rest = _zeros(PROBES, ROWS, 0)
    total = _zeros(PROBES, ROWS, PADDED)
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
            k = _load(key, head * stop + at, some, COLUMNS, WIDTH, PADDED)
            v = _load(value, head * stop + at, some, COLUMNS, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights, slope, bend = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            centred = tl.dot(o_bar, tl.trans(v), input_precision=PRECISION) - d[:, None]
            plain = weights * centred
            bent = (plain * slope).to(k.dtype)
            if MOVED:
                own = (head * batch + first_probe) * (stop - start) + at - start
                k_dot = _load_each(
                    key_dot, own, stop - start, some, probes, COLUMNS, WIDTH, PADDED, PROBES
                )
                v_dot = _load_each(
                    value_dot, own, stop - start, some, probes, COLUMNS, WIDTH, PADDED, PROBES
                )
            centres = ()
            rests = ()
            totals = ()
            for p in tl.static_range(PROBES):
                raw = tl.dot(q_dot[p], tl.trans(k), input_precision=PRECISION)
                if MOVED:
                    raw = tl.dot(q, tl.trans(k_dot[p]), raw, input_precision=PRECISION)
                raw *= scale
                moved = raw * slope
                near = tl.where(at == begin, tl.sum(weights * moved, 1), centre[p])
                moved = weights * (moved - near[:, None])
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                dotted = tl.dot(o_bar_dot[p], tl.trans(v), input_precision=PRECISION)
                if MOVED:
                    dotted = tl.dot(o_bar, tl.trans(v_dot[p]), dotted, input_precision=PRECISION)
                dotted = moved * centred + weights * (dotted - d_dot[p][:, None])
                if CAPPED:
                    dotted = dotted * slope + bend * raw * plain
                sums = total[p]
                if MOVED:
                    sums = tl.dot(bent, k_dot[p], sums, input_precision=PRECISION)
                totals = totals + (tl.dot(dotted.to(k.dtype), k, sums, input_precision=PRECISION),)
            centre = centres
            rest = rests
            total = totals

    adjoint = _load(pulled, at_row, left, ROWS, WIDTH, PADDED)
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        rows = tl.arange(0, ROWS)
        at = at_probe + p * count
        tl.store(mean + at + rows, centre[p] + rest[p], mask=rows < some)
        _store(result, at, some, scale * total[p] - rest[p][:, None] * adjoint, WIDTH)


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
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
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

    k = _load(key, head * stop + lowest, some, COLUMNS, WIDTH, PADDED)
    v = _load(value, head * stop + lowest, some, COLUMNS, WIDTH, PADDED)
    k_dot = _load_each(key_dot, own, moving, some, probes, COLUMNS, WIDTH, PADDED, PROBES)
    v_dot = _load_each(value_dot, own, moving, some, probes, COLUMNS, WIDTH, PADDED, PROBES)
    key_total = _zeros(PROBES, COLUMNS, PADDED)
    value_total = _zeros(PROBES, COLUMNS, PADDED)
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
        q = _load(query, at_row, left, ROWS, WIDTH, PADDED)
        o_bar = _load(output_bar, at_row, left, ROWS, WIDTH, PADDED)
        q_dot = _load_each(query_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
        o_bar_dot = _load_each(
            output_bar_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES
        )
        # A row beyond the last has an infinite normaliser, so no weight.
        lse = _statistics(normaliser, at_row, left, ROWS, float("inf"))
        d = _statistics(shift, at_row, left, ROWS, 0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights, slope, bend = _weights(scores, lse[None, :], seen, scale, softcap, CAPPED)
        centred = tl.dot(v, tl.trans(o_bar), input_precision=PRECISION) - d[None, :]
        plain = weights * centred
        bent = (plain * (slope * scale)).to(q.dtype)
        key_totals = ()
        value_totals = ()
        for p in tl.static_range(PROBES):
            inside = tl.where(p < probes, left, 0)
            m = _statistics(mean, at_probe + p * count, inside, ROWS, 0.0)
            d_dot = _statistics(shift_dot, at_probe + p * count, inside, ROWS, 0.0)
            raw = tl.dot(k, tl.trans(q_dot[p]), input_precision=PRECISION)
            raw = tl.dot(k_dot[p], tl.trans(q), raw, input_precision=PRECISION) * scale
            moved = weights * (raw * slope - m[None, :])
            sums = tl.dot(moved.to(q.dtype), o_bar, value_total[p], input_precision=PRECISION)
            value_totals = value_totals + (
                tl.dot(weights.to(q.dtype), o_bar_dot[p], sums, input_precision=PRECISION),
            )
            dotted = tl.dot(v, tl.trans(o_bar_dot[p]), input_precision=PRECISION)
            dotted = tl.dot(v_dot[p], tl.trans(o_bar), dotted, input_precision=PRECISION)
            dotted = moved * centred + weights * (dotted - d_dot[None, :])
            if CAPPED:
                dotted = dotted * slope + bend * raw * plain
            dotted = (dotted * scale).to(q.dtype)
            sums = tl.dot(dotted, q, key_total[p], input_precision=PRECISION)
            key_totals = key_totals + (tl.dot(bent, q_dot[p], sums, input_precision=PRECISION),)
        key_total = key_totals
        value_total = value_totals

    for p in tl.static_range(PROBES):
        inside = tl.where(p < probes, some, 0)
        _store(key_result, own + p * moving, inside, key_total[p], WIDTH)
        _store(value_result, own + p * moving, inside, value_total[p], WIDTH)


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
    heads, group, queries, _ = primal.query.shape
    masking, stop = primal.masking, primal.key.shape[1]
    window, softcap = masking.window or 0, masking.softcap or 0.0
    return heads, batch, group, queries, primal.start, stop, window, masking.scale, softcap


def _constants(primal: Primal, tile: Tile) -> dict[str, Any]:
    """What every kernel is compiled for."""
    masking, width = primal.masking, primal.query.shape[-1]
    return {
        "WIDTH": width,
        "PADDED": padded(width),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PROBES": tile.probes,
        "WINDOWED": masking.window is not None,
        "CAPPED": masking.softcap is not None,
        "PRECISION": PRECISION,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
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
            **_constants(primal, tile),
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
            **_constants(primal, tile),
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
            **_constants(primal, tile),
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
            **_constants(primal, tile),
        )
    if back is not None:
        results = [(x * back).to(dtype) for x in results]
    return results[0].transpose(-2, -3), results[1], results[2]


_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_WIDTHS = (64, 80, 96, 128, 256)


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
        for dtype, size in _BYTES.items():
            for width in _WIDTHS:
                tile = gpu.for_architecture(table, capability)[size, padded(width)]
                for masked in (False, True):
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
                        {
                            "WIDTH": width,
                            "PADDED": padded(width),
                            "ROWS": tile.rows,
                            "COLUMNS": tile.columns,
                            "PROBES": tile.probes,
                            "WINDOWED": masked,
                            "CAPPED": masked,
                            "PRECISION": PRECISION,
                        },
                        tile.warps,
                        tile.stages,
                    )
    for dtype in _BYTES:
        for width in _WIDTHS:
            names = shift_tangent_kernel.arg_names
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
