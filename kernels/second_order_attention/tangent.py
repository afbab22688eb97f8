# ruff: noqa: RUF005 - a kernel joins tuples by addition alone
# mypy: disable-error-code="assignment"
"""The kernel of attention's tangent; `triton.py` tells how it works."""

from __future__ import annotations

import triton
import triton.language as tl

from heat_fast.kernels.second_order_attention.primitives import (
    load,
    loads,
    mix,
    products,
    seen_keys,
    settle,
    softmax_weights,
    statistics,
    zero_rows,
    zeros,
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
    sunk,
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
    SUNK: tl.constexpr,
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
    begin, end = seen_keys(first_row, count, group, first, window, ROWS, WINDOWED)
    at_row = head * count + first_row
    at_probe = (head * batch + first_probe) * count + first_row

    q = load(query, at_row, left, ROWS, WIDTH, PADDED)
    lse = statistics(normaliser, at_row, left, ROWS, float("inf"))
    q_dot = loads(query_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
    centre = zeros(PROBES, ROWS)
    rest = zeros(PROBES, ROWS)
    total = zero_rows(PROBES, ROWS, PADDED)
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
            k = load(key, head * stop + at, some, COLUMNS, WIDTH, PADDED)
            v = load(value, head * stop + at, some, COLUMNS, WIDTH, PADDED)
            none = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            scores = products(q, k, none)
            weights, slope, _ = softmax_weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
            if MOVED:
                own = (head * batch + first_probe) * (stop - start) + at - start
                k_dot = loads(
                    key_dot,
                    own,
                    stop - start,
                    some,
                    probes,
                    COLUMNS,
                    WIDTH,
                    PADDED,
                    PROBES,
                )
                v_dot = loads(
                    value_dot,
                    own,
                    stop - start,
                    some,
                    probes,
                    COLUMNS,
                    WIDTH,
                    PADDED,
                    PROBES,
                )
            centres = ()
            rests = ()
            totals = ()
            for p in tl.static_range(PROBES):
                raw = products(q_dot[p], k, none)
                sums = total[p]
                if MOVED:
                    raw = products(q, k_dot[p], raw)
                    sums = mix(weights, v_dot[p], sums)
                moved = raw * (slope * scale)
                near = tl.where(at == begin, tl.sum(weights * moved, 1), centre[p])
                moved = weights * (moved - near[:, None])
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                totals = totals + (mix(moved, v, sums),)
            centre = centres
            rest = rests
            total = totals

    if SUNK:
        rest = settle(rest, centre, statistics(sunk, at_row, left, ROWS, 0.0), PROBES)
    place = (rows // group).to(tl.int64) * result_row + (rows % group) * result_member
    o = load(output, at_row, left, ROWS, WIDTH, PADDED).to(tl.float32)
    inner = tl.arange(0, PADDED)
    inside = (rows < count)[:, None] & (inner < WIDTH)[None, :]
    for p in tl.static_range(PROBES):
        base = result + head * result_head + (first_probe + p).to(tl.int64) * result_probe
        tl.store(
            base + place[:, None] + inner[None, :],
            (total[p] - rest[p][:, None] * o).to(result.dtype.element_ty),
            mask=inside & (p < probes),
        )
