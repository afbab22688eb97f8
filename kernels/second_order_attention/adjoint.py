# ruff: noqa: RUF005 - a kernel joins tuples by addition alone
# mypy: disable-error-code="assignment"
"""The kernels of attention's adjoint and of its tangent; `triton.py` tells how they work."""

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
    store,
    zero_rows,
    zeros,
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
):
    """`pulled` (Q_) and `shift` (D) of a tile of rows: what all probes' `Q_.` share."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads * ROWS
    count = queries * group
    left = count - first_row
    first = stop - queries
    rows = tl.arange(0, ROWS)
    position = first + (first_row + rows) // group
    begin, end = seen_keys(first_row, count, group, first, window, ROWS, WINDOWED)
    at_row = head * count + first_row

    q = load(query, at_row, left, ROWS, WIDTH, PADDED)
    o_bar = load(output_bar, at_row, left, ROWS, WIDTH, PADDED)
    o = load(output, at_row, left, ROWS, WIDTH, PADDED).to(tl.float32)
    d = tl.sum(o_bar.to(tl.float32) * o, 1)
    tl.store(shift + at_row + rows, d, mask=rows < left)
    lse = statistics(normaliser, at_row, left, ROWS, float("inf"))
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for at in range(begin, end, COLUMNS):
        some = tl.minimum(end - at, COLUMNS)
        keys = at + tl.arange(0, COLUMNS)
        seen = (keys < end)[None, :] & (keys[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (keys[None, :] > position[:, None] - window)
        k = load(key, head * stop + at, some, COLUMNS, WIDTH, PADDED)
        v = load(value, head * stop + at, some, COLUMNS, WIDTH, PADDED)
        none = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        scores = products(q, k, none)
        weights, slope, _ = softmax_weights(scores, lse[:, None], seen, scale, softcap, CAPPED)
        centred = products(o_bar, v, none) - d[:, None]
        bent = weights * centred * slope
        total = mix(bent, k, total)
    store(pulled, at_row, left, scale * total, WIDTH)


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
    o = load(output, at_row, left, ROWS, WIDTH, PADDED).to(tl.float32)
    o_bar = load(output_bar, at_row, left, ROWS, WIDTH, PADDED).to(tl.float32)
    o_dot = load(output_dot, at_probe, left, ROWS, WIDTH, PADDED).to(tl.float32)
    o_bar_dot = load(output_bar_dot, at_probe, left, ROWS, WIDTH, PADDED).to(tl.float32)
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
    sunk,
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
    begin, end = seen_keys(first_row, count, group, first, window, ROWS, WINDOWED)
    at_row = head * count + first_row
    at_probe = (head * batch + first_probe) * count + first_row

    q = load(query, at_row, left, ROWS, WIDTH, PADDED)
    o_bar = load(output_bar, at_row, left, ROWS, WIDTH, PADDED)
    lse = statistics(normaliser, at_row, left, ROWS, float("inf"))
    d = statistics(shift, at_row, left, ROWS, 0.0)
    q_dot = loads(query_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
    o_bar_dot = loads(output_bar_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
    d_dot = ()
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        d_dot = d_dot + (statistics(shift_dot, at_probe + p * count, some, ROWS, 0.0),)
    centre = zeros(PROBES, ROWS)
    rest = zeros(PROBES, ROWS)
    total = zero_rows(PROBES, ROWS, PADDED)
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
            weights, slope, bend = softmax_weights(
                scores, lse[:, None], seen, scale, softcap, CAPPED
            )
            centred = products(o_bar, v, none) - d[:, None]
            plain = weights * centred
            bent = (plain * slope).to(key.dtype.element_ty)
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
                if MOVED:
                    raw = products(q, k_dot[p], raw)
                raw *= scale
                moved = raw * slope
                near = tl.where(at == begin, tl.sum(weights * moved, 1), centre[p])
                moved = weights * (moved - near[:, None])
                centres = centres + (near,)
                rests = rests + (rest[p] + tl.sum(moved, 1),)
                dotted = products(o_bar_dot[p], v, none)
                if MOVED:
                    dotted = products(o_bar, v_dot[p], dotted)
                dotted = moved * centred + weights * (dotted - d_dot[p][:, None])
                if CAPPED:
                    dotted = dotted * slope + bend * raw * plain
                sums = total[p]
                if MOVED:
                    sums = mix(bent, k_dot[p], sums)
                totals = totals + (mix(dotted, k, sums),)
            centre = centres
            rest = rests
            total = totals

    if SUNK:
        rest = settle(rest, centre, statistics(sunk, at_row, left, ROWS, 0.0), PROBES)
    rows = tl.arange(0, ROWS)
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        tl.store(mean + at_probe + p * count + rows, centre[p] + rest[p], mask=rows < some)
    adjoint = load(pulled, at_row, left, ROWS, WIDTH, PADDED)
    for p in tl.static_range(PROBES):
        some = tl.where(p < probes, left, 0)
        values = scale * total[p] - rest[p][:, None] * adjoint
        store(result, at_probe + p * count, some, values, WIDTH)


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

    k = load(key, head * stop + lowest, some, COLUMNS, WIDTH, PADDED)
    v = load(value, head * stop + lowest, some, COLUMNS, WIDTH, PADDED)
    k_dot = loads(key_dot, own, moving, some, probes, COLUMNS, WIDTH, PADDED, PROBES)
    v_dot = loads(value_dot, own, moving, some, probes, COLUMNS, WIDTH, PADDED, PROBES)
    key_total = zero_rows(PROBES, COLUMNS, PADDED)
    value_total = zero_rows(PROBES, COLUMNS, PADDED)
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
        q = load(query, at_row, left, ROWS, WIDTH, PADDED)
        o_bar = load(output_bar, at_row, left, ROWS, WIDTH, PADDED)
        q_dot = loads(query_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES)
        o_bar_dot = loads(
            output_bar_dot, at_probe, count, left, probes, ROWS, WIDTH, PADDED, PROBES
        )
        # A row beyond the last has an infinite normaliser, so no weight.
        lse = statistics(normaliser, at_row, left, ROWS, float("inf"))
        d = statistics(shift, at_row, left, ROWS, 0.0)
        none = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
        scores = products(k, q, none)
        weights, slope, bend = softmax_weights(scores, lse[None, :], seen, scale, softcap, CAPPED)
        centred = products(v, o_bar, none) - d[None, :]
        plain = weights * centred
        bent = (plain * slope).to(query.dtype.element_ty)
        key_totals = ()
        value_totals = ()
        for p in tl.static_range(PROBES):
            inside = tl.where(p < probes, left, 0)
            m = statistics(mean, at_probe + p * count, inside, ROWS, 0.0)
            d_dot = statistics(shift_dot, at_probe + p * count, inside, ROWS, 0.0)
            raw = products(k, q_dot[p], none)
            raw = products(k_dot[p], q, raw) * scale
            moved = weights * (raw * slope - m[None, :])
            dotted = products(v, o_bar_dot[p], none)
            dotted = products(v_dot[p], o_bar, dotted)
            dotted = moved * centred + weights * (dotted - d_dot[None, :])
            if CAPPED:
                dotted = dotted * slope + bend * raw * plain
            sums = mix(moved, o_bar, value_total[p])
            value_totals = value_totals + (mix(weights, o_bar_dot[p], sums),)
            sums = mix(dotted, q, key_total[p])
            key_totals = key_totals + (mix(bent, q_dot[p], sums),)
        key_total = key_totals
        value_total = value_totals

    for p in tl.static_range(PROBES):
        inside = tl.where(p < probes, some, 0)
        store(key_result, own + p * moving, inside, scale * key_total[p], WIDTH)
        store(value_result, own + p * moving, inside, value_total[p], WIDTH)
