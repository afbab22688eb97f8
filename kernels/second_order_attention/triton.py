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
from heat_fast.kernels.branch_attention.triton import offsets_of, padded, rowwise, tile_of
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
def _visible(position, keys, inside, some, window, WINDOWED: tl.constexpr):
    """`[R, K]`, where the query of a row sees a key."""
    seen = inside[:, None] & some[None, :] & (keys[None, :] <= position[:, None])
    if WINDOWED:
        seen = seen & (keys[None, :] > position[:, None] - window)
    return seen


@triton.jit
def _probe_rows(
    pointer,
    head,
    first_probe,
    batch,
    stride_head,
    stride_probe,
    offsets,
    inside,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PROBES: tl.constexpr,
):
    """A tuple of the rows `[R, PADDED]` of each of a program's probes."""
    parts = ()
    for p in tl.static_range(PROBES):
        probe = first_probe + p
        base = pointer + head * stride_head + probe * stride_probe
        parts = parts + (tile_of(base, offsets, inside & (probe < batch), WIDTH, PADDED),)
    return parts


@triton.jit
def _store_rows(pointer, offsets, inside, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    inner = tl.arange(0, PADDED)
    tl.store(
        pointer + offsets[:, None] + inner[None, :],
        values.to(pointer.dtype.element_ty),
        mask=inside[:, None] & (inner < WIDTH)[None, :],
    )


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
    query_head,
    query_member,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    output_head,
    output_member,
    output_row,
    query_dot_head,
    query_dot_probe,
    query_dot_member,
    query_dot_row,
    key_dot_head,
    key_dot_probe,
    key_dot_row,
    value_dot_head,
    value_dot_probe,
    value_dot_row,
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
    first_probe = (tl.program_id(0) % groups).to(tl.int64) * PROBES
    head = (tl.program_id(0) // groups % heads).to(tl.int64)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (groups * heads)
    count = queries * group
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    place = rows // group
    member = rows % group
    first = stop - queries
    position = first + place
    end = first + tl.minimum((tile * ROWS + ROWS - 1) // group, queries - 1) + 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, first + tile * ROWS // group - window + 1)

    offsets = offsets_of(member, query_member) + offsets_of(place, query_row)
    q = tile_of(query + head * query_head, offsets, inside, WIDTH, PADDED)
    lse = tl.load(
        normaliser + (head * group + member) * queries + place, mask=inside, other=float("inf")
    )
    q_dot = _probe_rows(
        query_dot,
        head,
        first_probe,
        batch,
        query_dot_head,
        query_dot_probe,
        offsets_of(member, query_dot_member) + offsets_of(place, query_dot_row),
        inside,
        WIDTH,
        PADDED,
        PROBES,
    )
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
            keys = at + tl.arange(0, COLUMNS)
            some = keys < high
            seen = _visible(position, keys, inside, some, window, WINDOWED)
            k = tile_of(key + head * key_head, offsets_of(keys, key_row), some, WIDTH, PADDED)
            v = tile_of(value + head * value_head, offsets_of(keys, value_row), some, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights, slope, _ = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            if MOVED:
                k_dot = _probe_rows(
                    key_dot,
                    head,
                    first_probe,
                    batch,
                    key_dot_head,
                    key_dot_probe,
                    offsets_of(keys - start, key_dot_row),
                    some,
                    WIDTH,
                    PADDED,
                    PROBES,
                )
                v_dot = _probe_rows(
                    value_dot,
                    head,
                    first_probe,
                    batch,
                    value_dot_head,
                    value_dot_probe,
                    offsets_of(keys - start, value_dot_row),
                    some,
                    WIDTH,
                    PADDED,
                    PROBES,
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

    offsets = offsets_of(member, output_member) + offsets_of(place, output_row)
    o = tile_of(output + head * output_head, offsets, inside, WIDTH, PADDED).to(tl.float32)
    offsets = offsets_of(member, result_member) + offsets_of(place, result_row)
    for p in tl.static_range(PROBES):
        probe = first_probe + p
        _store_rows(
            result + head * result_head + probe * result_probe,
            offsets,
            inside & (probe < batch),
            total[p] - rest[p][:, None] * o,
            WIDTH,
            PADDED,
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
    query_head,
    query_member,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    output_head,
    output_member,
    output_row,
    output_bar_head,
    output_bar_member,
    output_bar_row,
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
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    count = queries * group
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    place = rows // group
    member = rows % group
    first = stop - queries
    position = first + place
    end = first + tl.minimum((tile * ROWS + ROWS - 1) // group, queries - 1) + 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, first + tile * ROWS // group - window + 1)

    offsets = offsets_of(member, query_member) + offsets_of(place, query_row)
    q = tile_of(query + head * query_head, offsets, inside, WIDTH, PADDED)
    offsets = offsets_of(member, output_bar_member) + offsets_of(place, output_bar_row)
    o_bar = tile_of(output_bar + head * output_bar_head, offsets, inside, WIDTH, PADDED)
    offsets = offsets_of(member, output_member) + offsets_of(place, output_row)
    o = tile_of(output + head * output_head, offsets, inside, WIDTH, PADDED)
    d = tl.sum(o_bar.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(
        normaliser + (head * group + member) * queries + place, mask=inside, other=float("inf")
    )
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for at in range(begin, end, COLUMNS):
        keys = at + tl.arange(0, COLUMNS)
        some = keys < end
        seen = _visible(position, keys, inside, some, window, WINDOWED)
        k = tile_of(key + head * key_head, offsets_of(keys, key_row), some, WIDTH, PADDED)
        v = tile_of(value + head * value_head, offsets_of(keys, value_row), some, WIDTH, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights, slope, _ = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
        centred = tl.dot(o_bar, tl.trans(v), input_precision=PRECISION) - d[:, None]
        bent = weights * centred * slope
        total = tl.dot(bent.to(k.dtype), k, total, input_precision=PRECISION)
    slot = head * count + rows
    tl.store(shift + slot, d, mask=inside)
    _store_rows(pulled, offsets_of(slot, WIDTH), inside, scale * total, WIDTH, PADDED)


@triton.jit
def shift_tangent_kernel(
    output,
    output_bar,
    output_dot,
    output_bar_dot,
    shift_dot,
    output_head,
    output_member,
    output_row,
    output_bar_head,
    output_bar_member,
    output_bar_row,
    output_dot_head,
    output_dot_probe,
    output_dot_member,
    output_dot_row,
    output_bar_dot_head,
    output_bar_dot_probe,
    output_bar_dot_member,
    output_bar_dot_row,
    heads,
    batch,
    group,
    queries,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`shift_dot` (D.) of a tile of rows of one probe."""
    probe = (tl.program_id(0) % batch).to(tl.int64)
    head = (tl.program_id(0) // batch % heads).to(tl.int64)
    rows = tl.program_id(0) // (batch * heads) * ROWS + tl.arange(0, ROWS)
    inside = rows < queries * group
    place = rows // group
    member = rows % group
    offsets = offsets_of(member, output_member) + offsets_of(place, output_row)
    o = tile_of(output + head * output_head, offsets, inside, WIDTH, PADDED).to(tl.float32)
    base = output_bar_dot + head * output_bar_dot_head + probe * output_bar_dot_probe
    offsets = offsets_of(member, output_bar_dot_member) + offsets_of(place, output_bar_dot_row)
    total = tl.sum(o * tile_of(base, offsets, inside, WIDTH, PADDED).to(tl.float32), 1)
    offsets = offsets_of(member, output_bar_member) + offsets_of(place, output_bar_row)
    o_bar = tile_of(output_bar + head * output_bar_head, offsets, inside, WIDTH, PADDED)
    base = output_dot + head * output_dot_head + probe * output_dot_probe
    offsets = offsets_of(member, output_dot_member) + offsets_of(place, output_dot_row)
    o_dot = tile_of(base, offsets, inside, WIDTH, PADDED).to(tl.float32)
    total += tl.sum(o_bar.to(tl.float32) * o_dot, 1)
    slots = (head * batch + probe) * (queries * group) + rows
    tl.store(shift_dot + slots, total, mask=inside)


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
    query_head,
    query_member,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    output_bar_head,
    output_bar_member,
    output_bar_row,
    query_dot_head,
    query_dot_probe,
    query_dot_member,
    query_dot_row,
    key_dot_head,
    key_dot_probe,
    key_dot_row,
    value_dot_head,
    value_dot_probe,
    value_dot_row,
    output_bar_dot_head,
    output_bar_dot_probe,
    output_bar_dot_member,
    output_bar_dot_row,
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
    """`Q_.` of a tile of rows `(query, member of the group)`, for a group of probes.

    Hands over `mean` (m) of every row.
    """
    groups = (batch + PROBES - 1) // PROBES
    first_probe = (tl.program_id(0) % groups).to(tl.int64) * PROBES
    head = (tl.program_id(0) // groups % heads).to(tl.int64)
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (groups * heads)
    count = queries * group
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    place = rows // group
    member = rows % group
    first = stop - queries
    position = first + place
    end = first + tl.minimum((tile * ROWS + ROWS - 1) // group, queries - 1) + 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, first + tile * ROWS // group - window + 1)

    offsets = offsets_of(member, query_member) + offsets_of(place, query_row)
    q = tile_of(query + head * query_head, offsets, inside, WIDTH, PADDED)
    offsets = offsets_of(member, output_bar_member) + offsets_of(place, output_bar_row)
    o_bar = tile_of(output_bar + head * output_bar_head, offsets, inside, WIDTH, PADDED)
    slot = head * count + rows
    lse = tl.load(
        normaliser + (head * group + member) * queries + place, mask=inside, other=float("inf")
    )
    q_dot = _probe_rows(
        query_dot,
        head,
        first_probe,
        batch,
        query_dot_head,
        query_dot_probe,
        offsets_of(member, query_dot_member) + offsets_of(place, query_dot_row),
        inside,
        WIDTH,
        PADDED,
        PROBES,
    )
    o_bar_dot = _probe_rows(
        output_bar_dot,
        head,
        first_probe,
        batch,
        output_bar_dot_head,
        output_bar_dot_probe,
        offsets_of(member, output_bar_dot_member) + offsets_of(place, output_bar_dot_row),
        inside,
        WIDTH,
        PADDED,
        PROBES,
    )
    d = tl.load(shift + slot, mask=inside, other=0.0)
    d_dot = ()
    for p in tl.static_range(PROBES):
        probe = first_probe + p
        at = (head * batch + probe) * count + rows
        d_dot = d_dot + (tl.load(shift_dot + at, mask=inside & (probe < batch), other=0.0),)

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
            keys = at + tl.arange(0, COLUMNS)
            some = keys < high
            seen = _visible(position, keys, inside, some, window, WINDOWED)
            k = tile_of(key + head * key_head, offsets_of(keys, key_row), some, WIDTH, PADDED)
            v = tile_of(value + head * value_head, offsets_of(keys, value_row), some, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights, slope, bend = _weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            centred = tl.dot(o_bar, tl.trans(v), input_precision=PRECISION) - d[:, None]
            plain = weights * centred
            bent = (plain * slope).to(k.dtype)
            if MOVED:
                k_dot = _probe_rows(
                    key_dot,
                    head,
                    first_probe,
                    batch,
                    key_dot_head,
                    key_dot_probe,
                    offsets_of(keys - start, key_dot_row),
                    some,
                    WIDTH,
                    PADDED,
                    PROBES,
                )
                v_dot = _probe_rows(
                    value_dot,
                    head,
                    first_probe,
                    batch,
                    value_dot_head,
                    value_dot_probe,
                    offsets_of(keys - start, value_dot_row),
                    some,
                    WIDTH,
                    PADDED,
                    PROBES,
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
                dotted = tl.dot(o_bar_dot[p], tl.trans(v), input_precision=PRECISION)
                if MOVED:
                    dotted = tl.dot(o_bar, tl.trans(v_dot[p]), dotted, input_precision=PRECISION)
                dotted = moved * centred + weights * (dotted - d_dot[p][:, None])
                sums = total[p]
                if MOVED:
                    sums = tl.dot(bent, k_dot[p], sums, input_precision=PRECISION)
                if CAPPED:
                    dotted = dotted * slope + bend * raw * plain
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                totals = totals + (tl.dot(dotted.to(k.dtype), k, sums, input_precision=PRECISION),)
            centre = centres
            rest = rests
            total = totals

    adjoint = tile_of(pulled, offsets_of(slot, WIDTH), inside, WIDTH, PADDED)
    offsets = offsets_of(member, result_member) + offsets_of(place, result_row)
    for p in tl.static_range(PROBES):
        probe = first_probe + p
        own = inside & (probe < batch)
        tl.store(mean + (head * batch + probe) * count + rows, centre[p] + rest[p], mask=own)
        _store_rows(
            result + head * result_head + probe * result_probe,
            offsets,
            own,
            scale * total[p] - rest[p][:, None] * adjoint,
            WIDTH,
            PADDED,
        )


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
    query_head,
    query_member,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    output_bar_head,
    output_bar_member,
    output_bar_row,
    query_dot_head,
    query_dot_probe,
    query_dot_member,
    query_dot_row,
    key_dot_head,
    key_dot_probe,
    key_dot_row,
    value_dot_head,
    value_dot_probe,
    value_dot_row,
    output_bar_dot_head,
    output_bar_dot_probe,
    output_bar_dot_member,
    output_bar_dot_row,
    key_result_head,
    key_result_probe,
    key_result_row,
    value_result_head,
    value_result_probe,
    value_result_row,
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
    first_probe = (tl.program_id(0) % groups).to(tl.int64) * PROBES
    head = (tl.program_id(0) // groups % heads).to(tl.int64)
    # Early keys are seen by the most queries: their programs come first.
    tile = tl.program_id(0) // (groups * heads)
    count = queries * group
    first = stop - queries
    lowest = start + tile * COLUMNS
    keys = lowest + tl.arange(0, COLUMNS)
    some = keys < stop

    k = tile_of(key + head * key_head, offsets_of(keys, key_row), some, WIDTH, PADDED)
    v = tile_of(value + head * value_head, offsets_of(keys, value_row), some, WIDTH, PADDED)
    k_dot = _probe_rows(
        key_dot,
        head,
        first_probe,
        batch,
        key_dot_head,
        key_dot_probe,
        offsets_of(keys - start, key_dot_row),
        some,
        WIDTH,
        PADDED,
        PROBES,
    )
    v_dot = _probe_rows(
        value_dot,
        head,
        first_probe,
        batch,
        value_dot_head,
        value_dot_probe,
        offsets_of(keys - start, value_dot_row),
        some,
        WIDTH,
        PADDED,
        PROBES,
    )
    key_total = _zeros(PROBES, COLUMNS, PADDED)
    value_total = _zeros(PROBES, COLUMNS, PADDED)
    begin = tl.maximum(0, lowest - first) * group
    end = count
    if WINDOWED:
        end = tl.minimum(count, (lowest + COLUMNS - 1 + window - first) * group)
    for at in range(begin, end, ROWS):
        rows = at + tl.arange(0, ROWS)
        inside = rows < count
        place = rows // group
        member = rows % group
        position = first + place
        seen = inside[None, :] & some[:, None] & (keys[:, None] <= position[None, :])
        if WINDOWED:
            seen = seen & (keys[:, None] > position[None, :] - window)
        offsets = offsets_of(member, query_member) + offsets_of(place, query_row)
        q = tile_of(query + head * query_head, offsets, inside, WIDTH, PADDED)
        offsets = offsets_of(member, output_bar_member) + offsets_of(place, output_bar_row)
        o_bar = tile_of(output_bar + head * output_bar_head, offsets, inside, WIDTH, PADDED)
        lse = tl.load(
            normaliser + (head * group + member) * queries + place, mask=inside, other=float("inf")
        )
        d = tl.load(shift + head * count + rows, mask=inside, other=0.0)
        q_dot = _probe_rows(
            query_dot,
            head,
            first_probe,
            batch,
            query_dot_head,
            query_dot_probe,
            offsets_of(member, query_dot_member) + offsets_of(place, query_dot_row),
            inside,
            WIDTH,
            PADDED,
            PROBES,
        )
        o_bar_dot = _probe_rows(
            output_bar_dot,
            head,
            first_probe,
            batch,
            output_bar_dot_head,
            output_bar_dot_probe,
            offsets_of(member, output_bar_dot_member) + offsets_of(place, output_bar_dot_row),
            inside,
            WIDTH,
            PADDED,
            PROBES,
        )
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights, slope, bend = _weights(scores, lse[None, :], seen, scale, softcap, CAPPED)
        centred = tl.dot(v, tl.trans(o_bar), input_precision=PRECISION) - d[None, :]
        plain = weights * centred
        bent = (plain * (slope * scale)).to(q.dtype)
        cast = weights.to(q.dtype)
        key_totals = ()
        value_totals = ()
        for p in tl.static_range(PROBES):
            probe = first_probe + p
            own = inside & (probe < batch)
            slots = (head * batch + probe) * count + rows
            m = tl.load(mean + slots, mask=own, other=0.0)
            d_dot = tl.load(shift_dot + slots, mask=own, other=0.0)
            raw = tl.dot(k, tl.trans(q_dot[p]), input_precision=PRECISION)
            raw = tl.dot(k_dot[p], tl.trans(q), raw, input_precision=PRECISION) * scale
            moved = weights * (raw * slope - m[None, :])
            sums = tl.dot(moved.to(q.dtype), o_bar, value_total[p], input_precision=PRECISION)
            value_totals = value_totals + (
                tl.dot(cast, o_bar_dot[p], sums, input_precision=PRECISION),
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
        probe = first_probe + p
        own = some & (probe < batch)
        base = key_result + head * key_result_head + probe * key_result_probe
        offsets = offsets_of(keys - start, key_result_row)
        _store_rows(base, offsets, own, key_total[p], WIDTH, PADDED)
        base = value_result + head * value_result_head + probe * value_result_probe
        offsets = offsets_of(keys - start, value_result_row)
        _store_rows(base, offsets, own, value_total[p], WIDTH, PADDED)


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


def _sizes(primal: Primal, batch: int) -> tuple[float, ...]:
    heads, group, queries, _ = primal.query.shape
    masking = primal.masking
    return (
        heads,
        batch,
        group,
        queries,
        primal.start,
        primal.key.shape[1],
        masking.window or 0,
        masking.scale,
        masking.softcap or 0.0,
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the reference; summed in float32."""
    heads, batch, group, queries, width = query.shape
    tensors = [
        rowwise(x)
        for x in (primal.query, primal.key, primal.value, primal.output, query, key, value)
    ]
    result = heads_like(query, width)
    table = gpu.for_architecture(_TANGENT, query.device)
    tile = table[query.element_size(), padded(width)]
    blocks = triton.cdiv(queries * group, tile.rows) * triton.cdiv(batch, tile.probes)
    with gpu.on(query):
        attention_tangent_kernel[(blocks * heads,)](
            *tensors,
            result,
            primal.normaliser.contiguous(),
            *_strides(*tensors, result),
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
    dtype, back = query.dtype, None
    if dtype == torch.float16:
        # Adjoints are small, and their products with weights would drop out of float16's range.
        # All results are linear in them: they are scaled by a power of two, and scaled back.
        largest = torch.maximum(output_bar.abs().amax(), output_bar_dot.abs().amax()).float()
        back = torch.exp2(torch.log2(largest.clamp(min=2.0**-24)).floor())
        output_bar, output_bar_dot = ((x / back).to(dtype) for x in (output_bar, output_bar_dot))
    sums = dtype if back is None else torch.float32
    query, key, value, output, output_bar, output_bar_dot = (
        rowwise(x) for x in (query, key, value, output, output_bar, output_bar_dot)
    )
    trunk = [rowwise(x) for x in (primal.query, primal.key, primal.value)]
    normaliser = primal.normaliser.contiguous()
    statistics = query.new_empty(heads * (1 + 2 * batch), group * queries, dtype=torch.float32)
    shift, shift_dot, mean = statistics.split([heads, heads * batch, heads * batch])
    pulled = query.new_empty(heads, group * queries, width, dtype=torch.float32)
    results = [torch.empty_like(x, dtype=sums) for x in (query, key, value)]
    sizes = _sizes(primal, batch)
    by_primal, by_rows, by_keys = (
        gpu.for_architecture(table, query.device)[query.element_size(), padded(width)]
        for table in (_PRIMAL, _ROWS, _KEYS)
    )
    with gpu.on(query):
        tensors = [*trunk, rowwise(primal.output), output_bar]
        adjoint_rows_kernel[(triton.cdiv(queries * group, by_primal.rows) * heads,)](
            *tensors,
            normaliser,
            shift,
            pulled,
            *_strides(*tensors),
            *sizes,
            **_constants(primal, by_primal),
        )
        tensors = [rowwise(primal.output), output_bar, output, output_bar_dot]
        blocks = triton.cdiv(queries * group, _SHIFT_ROWS) * batch
        shift_tangent_kernel[(blocks * heads,)](
            *tensors,
            shift_dot,
            *_strides(*tensors),
            *sizes[:4],
            WIDTH=width,
            PADDED=padded(width),
            ROWS=_SHIFT_ROWS,
        )
        blocks = triton.cdiv(queries * group, by_rows.rows) * triton.cdiv(batch, by_rows.probes)
        tensors = [*trunk, output_bar, query, key, value, output_bar_dot, results[0]]
        adjoint_tangent_rows_kernel[(blocks * heads,)](
            *tensors,
            normaliser,
            shift,
            pulled,
            shift_dot,
            mean,
            *_strides(*tensors),
            *sizes,
            **_constants(primal, by_rows),
        )
        blocks = triton.cdiv(key.shape[2], by_keys.columns) * triton.cdiv(batch, by_keys.probes)
        tensors = [*trunk, output_bar, query, key, value, output_bar_dot, *results[1:]]
        adjoint_tangent_keys_kernel[(blocks * heads,)](
            *tensors,
            normaliser,
            shift,
            shift_dot,
            mean,
            *_strides(*tensors),
            *sizes,
            **_constants(primal, by_keys),
        )
    query_bar, key_bar, value_bar = (
        x if back is None else (x * back).to(dtype) for x in results
    )
    return query_bar, key_bar, value_bar


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
        split = [names.index(each) for each in ("normaliser", "query_head", "heads", "scale")]
        for dtype, size in _BYTES.items():
            for width in _WIDTHS:
                tile = gpu.for_architecture(table, capability)[size, padded(width)]
                for masked in (False, True):
                    yield Variant(
                        kernel,
                        f"{dtype} D {width}{', masked' if masked else ''}",
                        {
                            **dict.fromkeys(names[: split[0]], f"*{dtype}"),
                            **dict.fromkeys(names[split[0] : split[1]], "*fp32"),
                            **dict.fromkeys(names[split[1] : split[2]], "i32:16"),
                            **dict.fromkeys(names[split[2] : split[3]], "i32"),
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
